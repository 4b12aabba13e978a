"""Compress, publish on the Hub, and load back as anybody would. Needs a token: `hf auth login`, or HF_TOKEN.

python scripts/examples/push.py --model my-model --text text.txt --output my-model-4bit --repo me/my-model-4bit
"""

from setting import Setting
from transformers import AutoModelForCausalLM

import hf_compact

setting = Setting(__doc__, "--repo", without=("--steps",))
recipe = {
    "stages": [{"method": "codebook", "bits": 4}],
    "calibration": {"num_sequences": 64, "sequence_length": setting.options.length},
}
hf_compact.compress(setting.folder, recipe, output=setting.output, calibration=setting.options.text or ())
print(hf_compact.push(setting.output, setting.options.repo))  # private; run it again if the network fails
model = AutoModelForCausalLM.from_pretrained(setting.options.repo)
print(f"loaded {type(model).__name__}, {model.get_memory_footprint() / 1e6:.1f} MB")
