"""The folder of a run that was interrupted before its first step: settings and a checkpoint."""

from pathlib import Path

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.checkpoint import CheckpointFolder


def saved_run(folder: Path, *arguments: str) -> Path:
    config, source, target = resolve(parse_config([*arguments, "--output", str(folder)], "train"))
    trainer = build_trainer(config, source, target)
    run = RunFolder(folder)
    run.prepare()
    run.write_config(config.to_dict())
    CheckpointFolder(run.checkpoints).save(0, trainer.state_dict())
    trainer.loader.close()
    return folder
