"""A rule of this toolkit inside transformers' own Trainer: where LoRA goes is decided here, the training is yours.

    python docs/examples/own_trainer.py                # the embedded MoE model and its task: offline, a minute on a CPU
    python docs/examples/own_trainer.py 200            # so many steps

What is ours: `les.allocate` measures what the rule needs and says which experts get LoRA, `les.attach` puts LoRA there.
What is yours: rows, collator, optimiser, Trainer.
"""

import sys

import torch
from transformers import Trainer, TrainingArguments

import lora_expert_search as les
from trainers import tasks

IGNORED = -100  # a label that no loss is taken on


def main(steps: int = 60) -> list[float]:
    """Trains LoRA on the hottest quarter of the experts; gives the losses that the Trainer logged."""
    allocation = les.allocate("sieve", model="tiny-moe", task="tiny_pairs", fraction=0.25)
    base = les.load_model("tiny-moe")
    adapter = les.attach(base.model, allocation, rank=4, lora_alpha=64)
    print(f"{allocation.total_experts} experts, {adapter.num_trainable:,} parameters")

    rows = tasks.load_task("tiny_pairs").datasets[0].training.rows(base.tokenizer, 128)
    trainer = Trainer(
        model=base.model,
        args=TrainingArguments(
            output_dir="own_trainer",
            max_steps=steps,
            per_device_train_batch_size=16,
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=list(rows),
        data_collator=lambda batch: collate(batch, base.tokenizer.pad_token_id or 0),
        # The adapter's parameters are none of the model's: the optimiser gets them here, and the Trainer's clipping
        # does not see them. The scaled rate learning_rate·lora_alpha of .1 suits most models (docs/recipes.md).
        optimizers=(torch.optim.AdamW(adapter.parameters(), lr=0.1 / 64), None),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def collate(batch: list, pad: int) -> dict[str, torch.Tensor]:
    """Rows of unequal length, padded on the right; the prompt has no labels."""
    longest = max(len(row.input_ids) for row in batch)
    ids = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), longest), IGNORED)
    for number, row in enumerate(batch):
        tokens = torch.tensor(row.input_ids)
        ids[number, : len(tokens)] = tokens
        labels[number, row.labels_start : len(tokens)] = tokens[row.labels_start :]
    mask = torch.arange(longest) < torch.tensor([[len(row.input_ids)] for row in batch])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main(*map(int, sys.argv[1:]))))
