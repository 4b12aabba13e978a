"""Quantization-aware training at 4 bits with the dense model as the teacher: two callbacks.

python scripts/examples/quantization_aware_training.py --model my-model --text text.txt --output my-model-4bit
"""

from setting import Setting
from transformers import Trainer

from hf_compact import DistillationCallback, TernaryCallback, TernaryConfig

setting = Setting(__doc__)
model, teacher = setting.model(), setting.model().eval()
levels = TernaryConfig(bits=4, scale="lsq", granularity="row", activation_bits=None)
trainer = Trainer(
    model,
    setting.arguments(),
    train_dataset=setting.rows(),
    callbacks=[TernaryCallback(levels), DistillationCallback(teacher, label_weight=0.2)],
)
trainer.train()
model.save_pretrained(setting.output)
setting.tokenizer.save_pretrained(setting.output)
