"""Formats of HF PEFT other than LoRA, and BitFit in PEFT's layout."""
