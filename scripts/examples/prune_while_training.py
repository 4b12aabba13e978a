"""Fine-tuning that removes a part of the model on the way: HESSO zeroes whole channels and heads, then they are cut out.

python scripts/examples/prune_while_training.py --model my-model --text text.txt --output my-model-pruned
"""

from setting import Setting
from transformers import Trainer

from hf_compact import HessoCallback

setting = Setting(__doc__)
model = setting.model()
before = model.num_parameters()
steps = setting.options.steps
callback = HessoCallback(target=0.2, warm_up_steps=steps // 8, pruning_steps=steps // 2, periods=min(10, steps // 2))
Trainer(model, setting.arguments(), train_dataset=setting.rows(), callbacks=[callback]).train()
model.save_pretrained(setting.output)  # an ordinary model, only smaller
setting.tokenizer.save_pretrained(setting.output)
print(f"parameters: {before} -> {model.num_parameters()}")
