"""What the shell says: dropped where results would hang on it, recorded where it stays, explained where it fails."""

import os
import re
import subprocess
import sys

import pytest

from biomass_jax.errors import PrepError, UsageError
from biomass_jax.runtime import environment

HOSTILE = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_DEFAULT_DTYPE_BITS": "64",
    "JAX_EXPLICIT_X64_DTYPES": "allow",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_SOFTMAX_CUSTOM_JVP": "0",
    "NVIDIA_TF32_OVERRIDE": "1",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_NUM_THREADS": "ALL_CPUS",
    "GDAL_CACHEMAX": "1",
    "GDAL_DATA": "/nowhere",
    "GDAL_HTTP_MAX_RETRY": "0",
    "GDAL_HTTP_TIMEOUT": "1",
    "GDAL_TIFF_INTERNAL_MASK": "YES",
    "GTIFF_POINT_GEO_IGNORE": "YES",
    "COMPRESS_OVERVIEW": "JPEG",
    "VSI_CACHE": "TRUE",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".tif",
    "PROJ_LIB": "/nowhere",
    "PROJ_DATA": "/nowhere",
    "PROJ_NETWORK": "ON",
}
KEPT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": "/somewhere",
    "GDAL_HTTP_COOKIEFILE": "/cookies",
    "GDAL_HTTP_BEARER": "token",
    "GDAL_HTTP_PROXY": "proxy:3128",
    "GDAL_DRIVER_PATH": "/plugins",
    "AWS_REGION": "us-west-2",
    "CPL_DEBUG": "ON",
    "CPL_TMPDIR": "/tmp",
    "OMP_NUM_THREADS": "2",
    "TZ": "Asia/Tokyo",
}


@pytest.fixture
def shell(monkeypatch):
    """Sets variables; what is changed meanwhile is put back."""
    for name in [*os.environ]:
        if name in HOSTILE or name in KEPT or name in ("XLA_FLAGS", *environment._PROXIES, *environment._CERTIFICATES):
            monkeypatch.delenv(name)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_what_results_would_hang_on_is_left_out_and_told(shell):
    shell(**HOSTILE, **KEPT)
    said = []
    environment.settle(said.append)
    assert not HOSTILE.keys() & os.environ.keys()
    assert {name: os.environ[name] for name in KEPT} == KEPT
    assert len(said) == 1 and all(name in said[0] for name in HOSTILE)
    environment.settle(said.append)
    assert len(said) == 1


def test_flags_of_quick_arithmetic_are_left_out_of_xla_flags_and_the_others_recorded(shell):
    shell(XLA_FLAGS="--xla_cpu_enable_fast_math=true --xla_force_host_platform_device_count=2", OMP_NUM_THREADS="2")
    said = []
    environment.settle(said.append)
    assert "--xla_cpu_enable_fast_math=true of XLA_FLAGS" in said[0]
    assert environment.recorded()["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2"
    assert environment.recorded()["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--xla_gpu_deterministic_ops=true --xla_nonsense=1", "--xla_nonsense"),
        ("--xla_tpu_enable_data_parallel_all_reduce_opt=true", "LIBTPU_INIT_ARGS"),
        ("no_such_file", "no_such_file"),
    ],
)
def test_flags_at_which_xla_would_end_the_process_are_refused(shell, flags, said):
    shell(XLA_FLAGS=flags)
    with pytest.raises(UsageError, match=f"^XLA_FLAGS .*{said}"):
        environment.settle(lambda what: None)
    environment.settle(lambda what: None, jax=False)


def chained(text):
    """An error whose cause tells, as libraries raise them."""
    try:
        try:
            raise OSError(text)
        except OSError as error:
            raise RuntimeError("it failed; see the exception before") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "variables, text, expected",
    [
        (
            {"JAX_PLATFORMS": "tpu"},
            "Unable to initialize backend 'tpu': INTERNAL: no libtpu.so",
            "JAX_PLATFORMS is 'tpu'",
        ),
        (
            {"JAX_NUM_CPU_DEVICES": "x"},
            'Invalid value "x" for JAX flag jax_num_cpu_devices',
            "JAX_NUM_CPU_DEVICES is 'x'",
        ),
        (
            {"JAX_LOG_COMPILES": "?"},
            "invalid truth value '?' for environment 'JAX_LOG_COMPILES'",
            "JAX_LOG_COMPILES is",
        ),
        ({"LD_LIBRARY_PATH": "/cuda-9"}, "CUDA driver version is insufficient for CUDA runtime version", "/cuda-9"),
        ({}, "jaxlib/cuda: libcudnn.so.9: cannot open shared object file", "CUDA can't be used"),
        ({}, "INTERNAL: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected", "JAX_PLATFORMS=cpu does without"),
        (
            {"PROJ_LIB": "/old"},
            "PROJ: /old/proj.db contains DATABASE.LAYOUT.VERSION.MINOR = 2 whereas a number >= 4 is expected",
            "PROJ_LIB is /old",
        ),
        ({"PROJ_DATA": "/old"}, "proj_create_from_database: Cannot find proj.db", "PROJ_DATA is /old"),
        ({"GDAL_DRIVER_PATH": "/old"}, "/old/gdal_HDF5.so: undefined symbol: H5open", "GDAL_DRIVER_PATH is /old"),
        (
            {"HDF5_USE_FILE_LOCKING": "TRUE"},
            "Unable to open file (unable to lock file, errno = 11)",
            "HDF5_USE_FILE_LOCKING",
        ),
        (
            {"HDF5_PLUGIN_PATH": "/p"},
            "Can't read data (required filter 'zstd' is not registered)",
            "HDF5_PLUGIN_PATH is /p",
        ),
        (
            {"REQUESTS_CA_BUNDLE": "/gone.pem"},
            "Could not find a suitable TLS CA certificate bundle, invalid path: /gone.pem",
            "REQUESTS_CA_BUNDLE is /gone.pem, and there is nothing",
        ),
        (
            {"CURL_CA_BUNDLE": "/gone"},
            "error setting certificate verify locations: CAfile: /gone",
            "CURL_CA_BUNDLE is /gone",
        ),
        ({}, "[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate", "set SSL_CERT_FILE"),
        (
            {"HTTPS_PROXY": "http://me:SECRET@proxy:3128"},
            "ProxyError('Cannot connect to proxy.')",
            "HTTPS_PROXY is http://proxy:3128",
        ),
        (
            {"http_proxy": "http://10.9.8.7:1"},
            "Failed to connect to 10.9.8.7 port 1",
            "http_proxy is http://10.9.8.7:1",
        ),
        ({"HTTP_PROXY": "http://[bad"}, "ValueError: Invalid IPv6 URL", "HTTP_PROXY is http://\\[bad"),
    ],
)
def test_a_fault_of_the_environment_is_one_sentence_that_names_the_variable(shell, variables, text, expected):
    shell(**variables)
    for error in (OSError(text), chained(text)):
        said = environment.told(error)
        assert said and "\n" not in said and "SECRET" not in said
        assert re.search(expected, said), said
    ours = environment.told(PrepError(f"a.h5: {text.replace('SECRET', '')}"))
    assert ours.startswith("a.h5: ") and re.search(expected, ours)
    assert environment.told(PrepError(ours)) == ours  # said once


@pytest.mark.parametrize("text", ["shapes (3,) and (4,) don't fit", "PROJ: proj_create: unrecognized format", "a URL"])
def test_other_errors_are_left_as_they_are(shell, text):
    shell(JAX_PLATFORMS="cpu", PROJ_DATA="/somewhere", HTTP_PROXY="http://proxy:3128", GDAL_DRIVER_PATH="/plugins")
    assert environment.told(ValueError(text)) is None
    assert environment.told(PrepError(text)) == text


def test_a_command_ends_with_one_line_or_with_the_programs_own_fault(capsys):
    assert environment.failed(PrepError("a.h5: lost")) == 1
    assert environment.failed(OSError("disk\n full"), OSError) == 1
    assert capsys.readouterr().err == "error: a.h5: lost\nerror: disk full\n"
    for fault in (KeyError("x"), OSError("disk full")):
        with pytest.raises(type(fault)) as raised:
            environment.failed(fault)
        assert raised.value is fault
    assert capsys.readouterr().err == ""


def run(root, command, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PROJ_"))}
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=kept | variables, capture_output=True, text=True, timeout=120
    )


def test_data_of_another_proj_is_an_error_that_names_the_variable(root, tmp_path):
    """In a Python program: commands leave PROJ_DATA out."""
    code = "from biomass_jax.data.raster.image import open_image; open_image('scene.tif')"
    (tmp_path / "scene.tif").write_bytes(b"")
    done = run(tmp_path, ["-c", code], PROJ_DATA=str(tmp_path), PYTHONPATH=str(root))
    last = done.stderr.splitlines()[-1]
    assert "RasterError: PROJ: " in last and f"PROJ_DATA is {tmp_path}, which doesn't hold the data" in last


@pytest.mark.slow
def test_draws_are_the_same_in_a_hostile_shell(root):
    code = """
from biomass_jax.runtime import environment
environment.settle(print)
import jax, numpy as np
key = jax.random.fold_in(jax.random.key(3), 5)
x = jax.random.normal(key, (64, 64)) @ jax.random.uniform(key, (64, 64))
print(x.dtype, np.asarray(jax.grad(lambda x: jax.nn.softmax(x).max())(x)).tobytes().hex())
"""
    plain, hostile = (run(root, ["-c", code], JAX_PLATFORMS="cpu", **shell) for shell in ({}, HOSTILE))
    assert plain.stdout.startswith("float32 ")
    assert hostile.stdout.splitlines()[-1] == plain.stdout.strip()
