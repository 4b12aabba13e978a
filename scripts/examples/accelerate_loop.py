"""The same in a loop of your own with accelerate: the callback is asked at five places.

python scripts/examples/accelerate_loop.py --model my-model --text text.txt --output my-model-ternary
accelerate launch scripts/examples/accelerate_loop.py ...
"""

from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from setting import Setting
from torch.utils.data import DataLoader

from hf_compact import TernaryCallback

setting = Setting(__doc__)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
callback = TernaryCallback(num_steps=setting.options.steps)
model = callback.prepare(setting.model())  # 1: before the optimizer is made
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
wrapped, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(setting.rows(), batch_size=4))
wrapped.train()
batches = chain.from_iterable(repeat(loader))  # again and again: each of several processes has its part of the rows
for step, batch in enumerate(islice(batches, setting.options.steps)):
    callback.begin_step(model, step)  # 2: how strongly to round
    callback.set_decay_(optimizer, step)  # 3: weight decay ends half way
    loss = wrapped(**batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
    optimizer.step()
    callback.step(model, step + 1, 3e-4)  # 4: after every step
    optimizer.zero_grad()
    accelerator.print(f"step {step + 1}: loss {loss.item():.3f}")
callback.finalize(model)  # 5: pack
if accelerator.is_main_process:
    model.save_pretrained(setting.output)
    setting.tokenizer.save_pretrained(setting.output)
