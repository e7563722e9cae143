"""ditattn's names in diffusers: added, found in every way that diffusers has, given options, taken away."""

import copy
import pickle
import threading

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("names")

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from small_models import built, output, tensors

import ditattn
from ditattn import DiffusionAttentionBackendEnum as Enum
from ditattn.integrations.diffusers import NAMES, install, uninstall, use


def chosen():
    return _AttentionBackendRegistry._active_backend


@pytest.fixture
def custom():
    """CUSTOM, registered with a class that writes down its options and the calls."""
    seen = []

    @ditattn.register_diffusion_backend(Enum.CUSTOM)
    class Backend(ditattn.AttentionBackend):
        @staticmethod
        def get_name():
            return "SEEN"

        @staticmethod
        def get_impl_cls():
            return Impl

    class Impl(ditattn.AttentionImpl):
        def forward(self, query, key, value, attn_metadata=None):
            seen.append(self.backend_kwargs)
            return torch.full_like(query, 7)

    yield seen
    Enum.CUSTOM.clear_override()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_member_like_those_of_diffusers(name):
    member = AttentionBackendName(name)
    assert isinstance(member, AttentionBackendName) and member == name and member.value == name
    assert member is AttentionBackendName[name.upper()] is getattr(AttentionBackendName, name.upper())
    assert member in list(AttentionBackendName) and AttentionBackendName.__members__[member.name] is member
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert {member: 1}[name] == 1 and {name: 1}[member] == 1
    with pytest.raises(AttributeError):
        setattr(AttentionBackendName, name.upper(), "another")


def test_the_names_of_diffusers_come_first_and_keep_their_order():
    listed = [member.value for member in AttentionBackendName]
    assert listed[-len(NAMES) :] == list(NAMES) and listed[0] == "flash" and len(set(listed)) == len(listed)


def test_installing_again_changes_nothing():
    before = dict(_AttentionBackendRegistry._backends), list(AttentionBackendName)
    install()
    assert before == (_AttentionBackendRegistry._backends, list(AttentionBackendName))


def test_names_can_be_taken_away_and_added_again():
    uninstall()
    uninstall()
    with pytest.raises(ValueError, match="'ditattn_flash' is not a valid AttentionBackendName"):
        AttentionBackendName("ditattn_flash")
    assert not hasattr(AttentionBackendName, "DITATTN_FLASH")
    install()
    assert AttentionBackendName("ditattn_flash") in _AttentionBackendRegistry._backends


def test_an_active_name_goes_with_the_others():
    before = chosen()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName("ditattn_flash"))
    uninstall()
    assert chosen() is before


def test_every_thread_may_install():
    uninstall()
    threads = [threading.Thread(target=install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = [member.value for member in AttentionBackendName]
    assert len(set(listed)) == len(listed) and set(NAMES) < set(listed)


def test_the_context_manager_of_diffusers_chooses(custom):
    install(extra={"ditattn_seen": "CUSTOM"})
    with attention_backend("ditattn_seen"):
        assert (dispatch_attention_fn(*tensors()) == 7).all()
    assert (dispatch_attention_fn(*tensors()) != 7).all() and len(custom) == 1


def test_the_method_of_diffusers_chooses_for_the_model_and_makes_it_the_active_one_of_all(custom):
    install(extra={"ditattn_seen": "CUSTOM"})
    (model, inputs), (other, _) = built("flux"), built("flux")
    model.set_attention_backend("ditattn_seen")
    try:
        output(model, inputs)
        assert len(custom) == 4
        output(other, inputs)
        assert len(custom) == 8  # which `use` is for
        model.reset_attention_backend()
        output(model, inputs)
        assert len(custom) == 12
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_a_copied_or_pickled_model_has_the_same_choice(custom):
    install(extra={"ditattn_seen": "CUSTOM"})
    for name in ("flux", "sd3"):
        model, inputs = built(name)
        with use(model, "ditattn_seen"):
            others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in others:
            custom.clear()
            output(other, inputs)
            assert len(custom) == 4


ACTIVE = """
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
print(registry.get_active_backend()[0].value)
"""


@pytest.mark.parametrize("name, extra", [("ditattn_flash", {}), ("ditattn_mine", {"ditattn_mine": "TORCH_SDPA"})])
def test_the_environment_chooses_where_the_names_are_there_before_models(run_python, name, extra):
    text = f"from ditattn.integrations.diffusers import install, uninstall\ninstall(extra={extra})\n"
    done = run_python("-c", f"{text}{ACTIVE}uninstall()\n{ACTIVE}", DIFFUSERS_ATTN_BACKEND=name)
    assert done.stdout.split() == [name, "native"], done.stderr


def test_the_environment_is_refused_by_diffusers_where_its_models_come_first(run_python):
    done = run_python("-c", "from diffusers import FluxTransformer2DModel", DIFFUSERS_ATTN_BACKEND="ditattn_flash")
    assert done.returncode == 1 and "'ditattn_flash' is not a valid AttentionBackendName" in done.stderr


def test_other_names_of_the_environment_stay(run_python):
    text = f"from ditattn.integrations.diffusers import install\ninstall()\n{ACTIVE}"
    done = run_python("-c", text, DIFFUSERS_ATTN_BACKEND="flex")
    assert done.stdout.split() == ["flex"], done.stderr


def test_options_reach_the_back_end_until_others_are_given(custom):
    def options_of_a_call():
        dispatch_attention_fn(*tensors(), backend="ditattn_seen")
        return custom.pop()

    install(extra={"ditattn_seen": "CUSTOM"})
    assert options_of_a_call() == {}
    install(options={"ditattn_seen": {"smooth_k": False, "pv": "fp8"}})
    assert options_of_a_call() == {"smooth_k": False, "pv": "fp8"}
    install()
    assert options_of_a_call() == {"smooth_k": False, "pv": "fp8"}
    install(options={"ditattn_seen": {"pv": "int8"}})
    assert options_of_a_call() == {"pv": "int8"}
    install(options={"ditattn_seen": {}})
    assert options_of_a_call() == {}


def test_options_of_the_quantized_name_change_its_result():
    query, key, value = tensors(seq_kv=64)
    key += 50  # what smoothing takes away
    smooth = dispatch_attention_fn(query, key, value, backend="ditattn_sage")
    install(options={"ditattn_sage": {"smooth_k": False}})
    rough = dispatch_attention_fn(query, key, value, backend="ditattn_sage")
    exact = dispatch_attention_fn(query, key, value, backend="native")
    assert (smooth - exact).norm() < 0.5 * (rough - exact).norm()
    install(options={"ditattn_sage": {"smooth_k": "perhaps"}})
    with pytest.raises(ValueError, match="smooth_k"):
        dispatch_attention_fn(query, key, value, backend="ditattn_sage")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"extra": {"Ditattn": "CUSTOM"}}, "lower-case"),
        ({"extra": {"ditattn-mine": "CUSTOM"}}, "lower-case"),
        ({"extra": {"ditattn": "CUSTOM"}}, "'ditattn' is taken"),
        ({"extra": {"native": "CUSTOM"}}, "'native' is taken"),
        ({"extra": {"ditattn_good": "CUSTOM", "ditattn_bad": "NO_SUCH"}}, "Unknown .* backend: 'NO_SUCH'"),
        ({"options": {"ditattn_mine": {}}}, "'ditattn_mine', which is none of the names: ditattn, "),
        ({"options": {"flash": {}}}, "'flash', which is none of the names"),
    ],
)
def test_what_cannot_be_installed_is_refused_as_a_whole(arguments, message):
    before = list(AttentionBackendName)
    with pytest.raises(ValueError, match=message):
        install(**arguments)
    assert list(AttentionBackendName) == before
