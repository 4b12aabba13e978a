"""Compress, then measure both models on a text that neither has seen, window by window, and by turns for the speed.

python scripts/examples/evaluate_models.py --model my-model --text text.txt --output my-model-4bit --test test.txt
"""

from setting import Setting

import hf_compact
from hf_compact import Protocol, SpeedConfig, Windows
from hf_compact.calibration import builtin_text

setting = Setting(__doc__, "--test", without=("--steps",))
length = setting.options.length
recipe = {"stages": [{"method": "codebook", "bits": 4}], "calibration": {"num_sequences": 64, "sequence_length": length}}
hf_compact.compress(setting.folder, recipe, output=setting.output, calibration=setting.options.text or ())
test = setting.options.test
if test is None:
    test = setting.scratch / "test.txt"
    test.write_text(builtin_text("evaluation"), encoding="utf-8")
speed = SpeedConfig(prompt_tokens=length // 2, new_tokens=8, repeats=3)
protocol = Protocol(windows=Windows(window_length=length, num_windows=8), speed=speed)  # tasks=("piqa", "arc_easy") needs lm-eval
results = hf_compact.measure([setting.output], [test], protocol, compare_with=setting.folder)
for model in results.models:
    (score,) = model.perplexity.values()
    print(f"{model.name}: perplexity {score['perplexity']:.3f}, {model.file_bytes / 1e6:.1f} MB")
(text,), faster = model.comparison["perplexity"].values(), model.comparison["speed"]
print(f"× dense: perplexity {text['ratio']:.4f}, decoding {faster['decode']:.2f} times as fast")
results.write(setting.output.with_suffix(".results.json"))  # for evaluation/compare.py
