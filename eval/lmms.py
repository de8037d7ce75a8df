"""The entry point that makes vlprune a model of lmms-eval.

    lmms-eval --model vlprune --model_args pretrained=FOLDER,plan=holov:keep=0.111 --tasks pope,mme --batch_size 8

lmms-eval calls `manifests` at every start, whatever model it runs, so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The models that vlprune adds."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="vlprune", chat_class_path="vlprune.eval.lmms_model.Vlprune")]
