"""Compacter adapters on SST-2 of GLUE: PEFT makes the model, the Trainer trains it.

python scripts/examples/compacter_glue.py --model google-bert/bert-base-uncased --output my-adapter

All tasks, seeds and the other methods beside it: scripts/glue_compacter.py. With --quick a tiny random BERT tells digits from letters.
"""

import numpy as np
from datasets import Dataset, load_dataset
from peft import get_peft_model
from setting import Setting
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
)

from hf_compact import CompacterConfig

setting = Setting(__doc__, without=("--text", "--length"))
tokenizer = setting.tokenizer
if setting.options.quick:
    rows = Dataset.from_dict({"sentence": ["12345", "abcde"] * 32, "label": [0, 1] * 32})
    splits = {"train": rows, "validation": rows}
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertForSequenceClassification(config)
else:
    splits = load_dataset("nyu-mll/glue", "sst2")
    model = AutoModelForSequenceClassification.from_pretrained(setting.folder, num_labels=2)
encoded = {
    name: split.map(lambda row: {"input_ids": tokenizer(row["sentence"], truncation=True, max_length=128).input_ids})
    for name, split in splits.items()
    if name != "test"
}
model = get_peft_model(model, CompacterConfig(task_type="SEQ_CLS", reduction_factor=16))
model.print_trainable_parameters()
trainer = Trainer(
    model, setting.arguments(label_names=["labels"]), train_dataset=encoded["train"], eval_dataset=encoded["validation"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda output: {"accuracy": float(np.mean(output.predictions.argmax(-1) == output.label_ids))},
)  # fmt: skip
trainer.train()
print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
model.save_pretrained(setting.output)  # the adapter alone
