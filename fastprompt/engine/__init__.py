"""Run a `PromptedViT` fast, and explain which implementation runs."""
