"""MoE-LoRA: adapter banks on experts and linear layers."""
