"""Train decoder and head alone on a frozen pretrained encoder, the set-up of the paper (arXiv 2406.19888).

    python -m biomass_jax.main --config finetune_frozen_encoder --workdir OUT \
        --config.data.path=SHARDS --config.init_from=PRETRAINED

The encoder's drop path stays on, as there. Hardware: a third of the work and memory of finetune_all_biomes.py.
Expected: the paper reached RMSE 68.7 and 70.9 Mg/ha on Brazil, against a U-Net's 65.5.
--config.reference=True: as finetune_all_biomes.py.
"""

from ml_collections import config_dict

from biomass_jax.configs import finetune_all_biomes


def get_config() -> config_dict.ConfigDict:
    """Fields of a run with a frozen encoder."""
    config = finetune_all_biomes.get_config().unlock()
    config.load = "encoder"
    config.optimizer.freeze = ("encoder",)
    return config.lock()
