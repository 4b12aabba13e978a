"""Training at 1.58 bits in an ordinary Trainer script: one callback.

python scripts/examples/trainer_callback.py --model my-model --text text.txt --output my-model-ternary
"""

from setting import Setting
from transformers import Trainer

from hf_compact import TernaryCallback

setting = Setting(__doc__)
model = setting.model()
trainer = Trainer(
    model,
    setting.arguments(),
    train_dataset=setting.rows(),
    callbacks=[TernaryCallback()],  # the only line that is not the script you have
)
trainer.train()
model.save_pretrained(setting.output)  # packed: the callback has finished its work
setting.tokenizer.save_pretrained(setting.output)
