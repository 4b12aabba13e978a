"""The same in TRL's SFTTrainer: training at 1.58 bits on conversations or texts. Needs `pip install trl`.

python scripts/examples/trl_sft.py --model my-model --text text.txt --output my-model-ternary
"""

import sys

from datasets import Dataset
from setting import Setting

from hf_compact import TernaryCallback

setting = Setting(__doc__)
try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    sys.exit("this example needs the package trl: pip install trl")
model = setting.model()
paragraphs = [part for part in setting.text.split("\n\n") if part.strip()][: 4 * setting.options.steps]
arguments = SFTConfig(
    str(setting.scratch), max_steps=setting.options.steps, per_device_train_batch_size=4, learning_rate=3e-4,
    max_length=setting.options.length, save_strategy="no", report_to="none", bf16=False, use_cpu=setting.arguments().use_cpu,
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = SFTTrainer(
    model, arguments, train_dataset=Dataset.from_dict({"text": paragraphs}), processing_class=setting.tokenizer,
    callbacks=[TernaryCallback()],
)  # fmt: skip
trainer.train()
model.save_pretrained(setting.output)
setting.tokenizer.save_pretrained(setting.output)
