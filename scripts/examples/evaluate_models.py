"""Compress, then measure both models on a text that neither has seen.

python scripts/examples/evaluate_models.py --model my-model --text text.txt --output my-model-4bit --test test.txt
"""

from setting import Setting

import hf_compact
from hf_compact.calibration import builtin_text

setting = Setting(__doc__, "--test")
length = setting.options.length
recipe = {"stages": [{"method": "codebook", "bits": 4}], "calibration": {"num_sequences": 64, "sequence_length": length}}
hf_compact.compress(setting.folder, recipe, output=setting.output, calibration=setting.options.text or ())
test = setting.options.test
if test is None:
    test = setting.scratch / "test.txt"
    test.write_text(builtin_text("evaluation"), encoding="utf-8")
for row in hf_compact.evaluate([setting.folder, setting.output], [test], num_windows=8, window_length=length):
    print(
        f"{row['model']}: perplexity {row['perplexity']:.3f} ({row['ratio']:.4f} of the dense one), {row['file_bytes'] / 1e6:.1f} MB"
    )
