"""Fine-tune the released model on the chips of one biome, the reference's few-shot experiment.

    python -m biomass_jax.convert --input biomass_model_lightning.ckpt --with-optimizer --output MODEL
    python -m biomass_jax.main --config few_shot_taiga --workdir OUT \
        --config.data.path=granite-geospatial-biomass-datasets/taiga_datasplit --config.init_from=MODEL

The reference *resumes* its all-biome run: Adam's moments, the learning rate and the plateau continue, the means and
stds are those of the biome's own training chips. The all-biome run had used 114 of its 300 epochs.

Hardware: as finetune_all_biomes.py. Expected: the reference's validation RMSE fell from 31.08 to 28.55 Mg/ha.
--config.reference=True: as finetune_all_biomes.py, and pixels of no data that are 0 count into means and stds.
"""

from ml_collections import config_dict

from biomass_jax.configs import finetune_all_biomes


def get_config() -> config_dict.ConfigDict:
    """Fields of a few-shot run."""
    config = finetune_all_biomes.get_config().unlock()
    config.epochs = 186
    config.load = "all"
    config.resume_optimizer = True
    config.data.statistics = "dataset"
    return config.lock()
