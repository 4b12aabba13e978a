"""Data-parallel training over a slow network: 1-bit Adam sends a thirty-second of the bytes after its warm-up.

torchrun --nproc_per_node 2 scripts/examples/one_bit_adam.py --model my-model --text text.txt --output my-training
"""

from setting import Setting
from transformers import Trainer

from hf_compact import OneBitAdamCallback, OneBitAdamConfig

setting = Setting(__doc__)
model = setting.model()
arguments = setting.arguments(ddp_backend="gloo" if setting.arguments().use_cpu else None)
callback = OneBitAdamCallback(OneBitAdamConfig(freeze=max(1, setting.options.steps // 5)))
trainer = Trainer(model, arguments, train_dataset=setting.rows(), callbacks=[callback])
trainer.train()  # prints at the end what every rank has sent
if trainer.is_world_process_zero():
    model.save_pretrained(setting.output)
    setting.tokenizer.save_pretrained(setting.output)
