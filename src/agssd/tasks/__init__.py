"""Downstream tasks: LightningModules that fine-tune or probe an encoder."""
