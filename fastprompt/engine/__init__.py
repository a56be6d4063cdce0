"""Running a `PromptedViT` fast, and telling what runs."""
