"""For all tests: a slow machine is no failing property, and which tests share a process under pytest-xdist."""

import pytest
from hypothesis import settings

settings.register_profile("planaria", deadline=None)
settings.load_profile("planaria")

# Files whose tests start copies of a server that imports torch first (forked.py): it is started once for all of them.
FORKED = {
    "tests/benchmarks/test_scripts.py", "tests/inference/server/test_api.py", "tests/inference/server/test_errors.py",
    "tests/inference/test_chat.py", "tests/lora/test_ranks.py", "tests/moe/test_bias.py", "tests/moe/test_dispatch.py",
    "tests/moe/test_families_parallel.py", "tests/trainer/test_cli.py", "tests/trainer/test_data.py",
    "tests/trainer/test_expert_parallel.py", "tests/trainer/test_rotation.py", "tests/trainer/test_routing_trace.py",
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, so that what they share is made once; so do those of FORKED."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "forked" if file in FORKED else file

    return ByFile(config, log)
