"""Search what a grid does not cover, such as the number of prompts, with Optuna (`pip install optuna`).

python examples/optuna_search.py birds --trials 20

`fp.fit_grid` trains adapters that differ in their recipes in one batch. Trials that differ in their sizes run one by
one, and Optuna ends those that fall behind.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

import fastprompt as fp


class Report(fp.Callback):
    """Tells Optuna the validation accuracy of each epoch, and ends the trial if Optuna says so."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_epoch(self, row: Any) -> None:
        self.trial.report(row["val_accuracy"], row["epoch"])
        if self.trial.should_prune():
            raise optuna.TrialPruned


def search(folder: Path, backbone_name: str, image_size: int, trials: int, epochs: int) -> optuna.Study:
    """Choose method options and learning rate on the validation pictures."""
    data = fp.load_data(folder, image_size=image_size)
    backbone = fp.load_backbone(backbone_name, image_size=image_size)

    def objective(trial: optuna.Trial) -> float:
        config = fp.VPTConfig(
            num_prompts=trial.suggest_int("num_prompts", 1, 50, log=True),
            first_block=trial.suggest_int("first_block", 0, len(backbone.blocks) - 1),
        )
        model = fp.PromptedViT(backbone, config, num_classes=data.num_classes)
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        result = fp.fit(model, data.train, data.val, lr=lr, epochs=epochs, callbacks=[Report(trial)], progress=False)
        return result.best_val_accuracy

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials, catch=(FloatingPointError,))  # a diverged trial has no value
    return study


def main(words: Sequence[str] | None = None) -> None:
    """Search, and print the best trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    asked = parser.parse_args(words)
    best = search(asked.folder, asked.backbone, asked.image_size, asked.trials, asked.epochs).best_trial
    print(f"validation accuracy {best.value:.3f} with {best.params}")


if __name__ == "__main__":
    main()
