"""Compress to 3 bits without training, then win quality back with a small adapter that learns from the dense model.

python scripts/examples/compress_then_recover.py --model my-model --text text.txt --output my-model-3bit
"""

from setting import Setting

import hf_compact
from hf_compact.config import DistillationConfig

setting = Setting(__doc__)
recipe = {
    "stages": [{"method": "codebook", "bits": 3}],
    "calibration": {"num_sequences": 64, "sequence_length": setting.options.length},
}
report = hf_compact.compress(setting.folder, recipe, output=setting.output, calibration=setting.options.text or ())
print(report.to_markdown())
found = hf_compact.recover(
    setting.output, setting.options.text or (), teacher=setting.folder, sequence_length=setting.options.length,
    training=DistillationConfig(num_sequences=4 * setting.options.steps, learning_rate=3e-3),
)  # fmt: skip
print(f"held-out perplexity: {found['perplexity_before']:.2f} -> {found['perplexity_after']:.2f}, adapter in {found['output']}")
