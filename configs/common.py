"""Fields that several runs share. Configs start from `get_config` or `training` and add their own.

Not a run of its own: take one of the other files in this folder.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Fields of every run that uses a finished model; unlocked, so that a config can add to them."""
    config = _every_run()
    config.bundle = config_dict.placeholder(str)  # folder of the model: weights, bands, statistics
    return config


def _every_run() -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.mode = config_dict.placeholder(str)  # what main.py runs; each config sets its own
    config.batch_size = config_dict.placeholder(int)  # images a step over all devices together; each config's own
    config.dtype = "float32"  # or bfloat16, inside the model; weights and results stay float32
    config.matmul_precision = "default"  # default | high | highest, of float32 products, as JAX has it
    return config


def model() -> config_dict.ConfigDict:
    """The encoder's fields. A field that is not given comes from the bundle of `init_from`, else from the variant."""
    group = config_dict.ConfigDict()
    group.variant = "swin_b"  # swin_t | swin_s | swin_b | swin_l
    group.embed_dim = config_dict.placeholder(int)
    group.depths = config_dict.placeholder(tuple)
    group.num_heads = config_dict.placeholder(tuple)
    group.window_size = config_dict.placeholder(int)
    group.mlp_ratio = config_dict.placeholder(float)
    group.patch_size = config_dict.placeholder(int)  # px
    group.shift_single_window = config_dict.placeholder(bool)  # granite's weights need True, official Swin's False
    group.drop_path_rate = config_dict.placeholder(float)
    group.remat = ()  # stages (0 to 3) computed twice to save memory
    return group


def training() -> config_dict.ConfigDict:
    """Fields of every training run."""
    config = _every_run()
    config.seed = 42  # of weights, the order of chips, augmentation, drop path
    config.epochs = config_dict.placeholder(int)  # length of the run, in passes over the training chips
    config.steps = config_dict.placeholder(int)  # length of the run in steps; where it is given, epochs don't count
    config.log_every = 50  # steps between two lines
    config.draw_every = 10  # epochs between pictures of validation chips; 0 = none
    config.init_from = config_dict.placeholder(str)  # a bundle's folder; None = random weights
    config.load = "all"  # of it: all | encoder
    config.resume_optimizer = False  # go on with its Adam moments, learning rate and plateau, too
    config.overwrite = False  # begin anew in a workdir that holds a run
    config.deterministic = False  # on GPU: slower, equal bits in every run
    config.profile = config_dict.placeholder(str)  # "10:20" traces these steps into WORKDIR/profile
    config.model = model()

    config.data = config_dict.ConfigDict()
    config.data.path = config_dict.placeholder(str)  # shards (data_prep), or folders of GeoTIFFs as published
    # Names of a GeoTIFF's bands where its descriptions don't say, as configs/predict.py has them.
    config.data.bands = config_dict.placeholder(str)
    config.data.statistics = config_dict.placeholder(str)  # bundle (default with init_from) | dataset (default without)
    config.data.means = config_dict.placeholder(tuple)  # or explicitly, six numbers each
    config.data.stds = config_dict.placeholder(tuple)
    config.data.threads = 8  # that read chips
    config.data.cache = "host"  # device: all chips lie on the device, where they fit

    config.optimizer = config_dict.ConfigDict()  # AdamW
    config.optimizer.learning_rate = 1e-4  # the peak
    config.optimizer.reference_batch = 0  # the rate is for this global batch and scaled to batch_size; 0 = as it is
    config.optimizer.weight_decay = 0.05
    config.optimizer.decay = "weights"  # all: norms, biases and bias tables too
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.clip_norm = 0.0  # global norm of the gradient; 0 = off
    config.optimizer.layer_decay = 1.0  # the rate falls by this factor from layer to layer towards the input
    config.optimizer.freeze = ()  # weights that stay: ("encoder",), ("encoder/stages_0",)
    config.optimizer.ema_decay = 0.0  # of averaged weights, which are then scored and exported; 0 = off
    config.optimizer.gradient_accumulation = 1  # micro-batches a step

    config.schedule = config_dict.ConfigDict()
    config.schedule.kind = "cosine"  # plateau | constant | cosine | multistep
    config.schedule.warmup_epochs = 0.0
    config.schedule.warmup_from = 0.0  # rate of the first step
    config.schedule.min_lr = 0.0
    config.schedule.milestones = ()  # multistep: epochs after which the rate falls by gamma
    config.schedule.gamma = 0.1
    config.schedule.factor = 0.1  # plateau: the rate falls by it ...
    config.schedule.patience = 10  # ... after more than so many epochs ...
    config.schedule.threshold = 1e-4  # ... without a val/loss lower by this share
    config.schedule.stop_patience = 0  # the run ends after so many epochs without a lower val/loss; 0 = never

    config.mesh = config_dict.ConfigDict()
    config.mesh.data = -1  # devices over which the batch is split; -1 = the rest
    config.mesh.fsdp = 1  # devices over which weights and optimiser state are split too

    config.checkpoint = config_dict.ConfigDict()
    config.checkpoint.keep = 2  # latest ones, beside the best
    config.checkpoint.every_steps = 0  # also within an epoch; 0 = at its end only
    return config
