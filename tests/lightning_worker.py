"""What one of several ranks of a Lightning run does; in a module that they can import."""

import copy
import os
import warnings

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from gnsmon.lightning import GNSCallback


def fit_on_rank(rank, module, loader, settings, trainer_settings):
    """Fit, and leave the readings' raw numbers, the state and the weights in files."""
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="29500")
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    module = copy.deepcopy(module)  # what comes from another process is in memory shared by all
    readings = []
    callback = GNSCallback(every=1, strict=True, sinks=[readings.append], **settings)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        callbacks=[callback] if settings else [],
        use_distributed_sampler=False,  # Lightning's own shuffles
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "max_epochs": 1, **trainer_settings},
    )
    sampler = DistributedSampler(loader.dataset, shuffle=False)
    trainer.fit(module, DataLoader(loader.dataset, loader.batch_size, sampler=sampler))
    assert (len(readings) > 0) == (rank == 0 and bool(settings))
    of = [(m._forward_pre_hooks, m._forward_hooks) for m in module.modules()]
    hooks = [hook for pair in of for kind in pair for hook in kind.values()]
    assert not [h for h in hooks if type(h).__module__.startswith("gnsmon")]
    found = {
        "readings": readings,
        "state": callback.state_dict(),
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
    }
    torch.save(found, f"rank{rank}{'' if settings else '-bare'}.pt")


def whole(value):
    """The tensor, of all shards."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
