"""Formats of HF PEFT other than LoRA."""
