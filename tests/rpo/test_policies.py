"""Policies on tiny FLUX, SD3 and Qwen-Image-Edit pipelines, written and read in the real format.

The oracle is the stock pipeline: with the same initial latents, our deterministic sampler must end
where its own loop ends, guidance, schedule and decoding included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image
from torch import Tensor

from arr_fast.errors import ArrFastError, PromptTooLongError, UnsupportedModelError
from arr_fast.rpo.policies.base import Policy, cat_conditions, select_conditions
from arr_fast.rpo.policies.diffusers_policy import DiffusersPolicy, LoraOptions, restore_weights
from arr_fast.rpo.policies.flux import FluxPolicy
from arr_fast.rpo.policies.loading import load_policy
from arr_fast.rpo.policies.qwen_processor import processor_components
from arr_fast.rpo.rollout import PromptBatch, SamplingConfig
from arr_fast.rpo.sampler import Sampler
from arr_fast.rpo.sde import build_schedule
from tests.rpo.tiny_pipelines import write_flux, write_qwen_edit, write_sd3

SIZE = 16
PROMPTS = ("a red circle", "two blue squares, one on the left")
OPTIONS: dict[str, dict[str, Any]] = {
    "flux": {"max_sequence_length": 48, "guidance": 2.0},
    "flux-cfg": {"max_sequence_length": 48, "true_cfg": 3.0, "negative_prompt": "bad"},
    "sd3": {"max_sequence_length": 48, "true_cfg": 3.0, "negative_prompt": "bad"},
    "qwen": {"max_sequence_length": 256, "true_cfg": 3.0, "negative_prompt": "bad"},
    "plus": {"max_sequence_length": 256, "true_cfg": 3.0, "negative_prompt": "bad"},
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "flux": write_flux,
    "sd3": write_sd3,
    "qwen": write_qwen_edit,
    "plus": lambda directory: write_qwen_edit(directory, plus=True),
}
Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Directories of the pipelines, each written once, when it is first asked for."""
    root = tmp_path_factory.mktemp("pipelines")

    def find(case: str) -> Path:
        name = case.removesuffix("-cfg")
        if not (root / name).exists():
            WRITERS[name](root / name)
        return root / name

    return find


def load(folder: Folders, case: str, **options: Any) -> DiffusersPolicy:
    given = {"height": SIZE, "width": SIZE, "lora": LoraOptions(4, 8), **OPTIONS[case], **options}
    policy: DiffusersPolicy = load_policy(folder(case), **given)
    return policy


def sources_of(policy: DiffusersPolicy) -> tuple[Image.Image, ...] | None:
    if not policy.edits:
        return None
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    return tuple(Image.fromarray(each) for each in pixels)


def encoded(policy: DiffusersPolicy) -> Any:
    return policy.encode(PROMPTS, sources_of(policy))


def move_adapter(policy: DiffusersPolicy, scale: float = 0.2) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def sample(policy: DiffusersPolicy, steps: int = 3) -> tuple[Tensor, Tensor]:
    """(initial noise, clean latents) of the first candidates, deterministic."""
    batch = PromptBatch((0, 1), PROMPTS, encoded(policy), sources_of(policy))
    sampler = Sampler(policy, build_schedule(policy.sigmas(steps), "ode"), SamplingConfig())
    latents = sampler.sample(batch).latents[::2]
    return latents[:, 0], latents[:, -1]


def stock_images(
    policy: DiffusersPolicy, noise: Tensor, steps: int = 3, lora: Path | None = None
) -> np.ndarray:
    """What the stock pipeline makes of the same noise: float [2, H, W, 3]."""
    path = policy.pipeline.config["_name_or_path"]
    pipeline = DiffusionPipeline.from_pretrained(path, **type(policy).components(path, None))
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    arguments: dict[str, Any] = {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": steps,
        "output_type": "np",
        "max_sequence_length": policy.max_sequence_length,
    }
    if policy.name == "sd3":
        arguments["guidance_scale"] = policy.true_cfg
    else:
        arguments["true_cfg_scale"] = policy.true_cfg
    if policy.name == "flux":
        arguments["guidance_scale"] = policy.guidance
    if policy.true_cfg > 1:
        arguments["negative_prompt"] = policy.negative_prompt
    sources, images = sources_of(policy), []
    for number, prompt in enumerate(PROMPTS):
        if sources is not None:
            arguments["image"] = sources[number]
        images.append(pipeline(prompt=prompt, latents=noise[number : number + 1], **arguments)[0])
    return np.concatenate(images)


def our_images(policy: DiffusersPolicy, latents: Tensor) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) / 255 for image in policy.decode(latents)])


@pytest.fixture
def small_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock edit pipelines resize sources to about a megapixel; here they stay tiny."""
    monkeypatch.setattr(edit, "calculate_dimensions", lambda *_: (SIZE, SIZE, None))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", SIZE * SIZE)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    original = plus.calculate_dimensions

    def dimensions(area: int, ratio: float) -> tuple[int, int]:
        return (SIZE, SIZE) if area == SIZE * SIZE else original(area, ratio)

    monkeypatch.setattr(plus, "calculate_dimensions", dimensions)


@pytest.mark.parametrize("case", list(OPTIONS))
def test_samples_as_the_stock_pipeline_does(
    folder: Folders, case: str, small_sources: None
) -> None:
    policy = load(folder, case)
    assert isinstance(policy, Policy)
    noise, latents = sample(policy)
    ours, theirs = our_images(policy, latents), stock_images(policy, noise)
    assert float(theirs.std()) > 0.02
    assert float(np.abs(ours - theirs).max()) < 1 / 255 + 1e-3


@pytest.mark.parametrize("case", ["flux", "sd3", "qwen"])
def test_lora_round_trip_through_stock_diffusers(
    folder: Folders, case: str, tmp_path: Path, small_sources: None
) -> None:
    """A trained adapter loads with `load_lora_weights` and changes the image as ours does."""
    policy = load(folder, case)
    noise, base = sample(policy)
    move_adapter(policy)
    moved = sample(policy)[1]
    ours = our_images(policy, moved)
    policy.save(tmp_path)
    theirs = stock_images(policy, noise, lora=tmp_path)
    change = float(np.abs(ours - our_images(policy, base)).max())
    assert change > 0.03
    assert float(np.abs(ours - theirs).max()) < 1 / 255 + 1e-3
    fresh = load(folder, case)
    before = dict(fresh.trainable_parameters())
    fresh.load(tmp_path)
    after = fresh.trainable_parameters()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(after[n], p) for n, p in policy.trainable_parameters().items())


@pytest.mark.parametrize("gathered", [False, True])
def test_whole_network_round_trip(folder: Folders, tmp_path: Path, gathered: bool) -> None:
    """Also where the weights are handed over, as they are when the network itself is split."""
    policy = load(folder, "flux", lora=None)
    move_adapter(policy, 0.01)
    weights = {n: t.clone() for n, t in policy.transformer.state_dict().items()}
    if gathered:
        with torch.no_grad():
            policy.transformer.proj_out.weight.zero_()
    policy.save(tmp_path, weights if gathered else None)
    restore_weights(policy.transformer.state_dict(), weights, tmp_path)
    fresh = load(folder, "flux", lora=None)
    fresh.load(tmp_path)
    assert torch.equal(sample(fresh)[1], sample(policy)[1])
    with fresh.reference():
        reference = sample(fresh)[1]
    assert torch.equal(reference, sample(load(folder, "flux"))[1])


@pytest.mark.parametrize("lora", [LoraOptions(4, 8), None], ids=["lora", "full"])
def test_reference_is_the_untrained_model(folder: Folders, lora: LoraOptions | None) -> None:
    policy = load(folder, "flux", lora=lora)
    conditions = encoded(policy)
    latents, sigma = torch.randn(2, *policy.latent_shape), torch.tensor([1.0, 0.4])
    with torch.no_grad():
        base = policy.velocity(latents, sigma, conditions)
        move_adapter(policy, 0.05)
        moved = policy.velocity(latents, sigma, conditions)
        with policy.reference():
            reference = policy.velocity(latents, sigma, conditions)
        again = policy.velocity(latents, sigma, conditions)
    assert torch.equal(reference, base) and torch.equal(again, moved)
    assert float((moved - base).abs().mean()) > 1e-3
    assert all(p.requires_grad for p in policy.trainable_parameters().values())
    frozen = [p for n, p in policy.transformer.named_parameters() if lora and ".lora_" not in n]
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("case", ["flux-cfg", "sd3", "qwen"])
def test_no_gradient_through_the_unconditional_branch(folder: Folders, case: str) -> None:
    policy = load(folder, case)
    move_adapter(policy)
    conditions = encoded(policy)
    latents, sigma = torch.randn(2, *policy.latent_shape), torch.tensor([0.9, 0.4])
    conditional = policy._predict(latents, sigma, conditions, negative=False)
    with torch.no_grad():
        unconditional = policy._predict(latents, sigma, conditions, negative=True)
    assert float((conditional - unconditional).detach().abs().mean()) > 1e-3
    guided = unconditional + 3.0 * (conditional - unconditional)
    if case == "qwen":
        guided = guided * (conditional.norm(dim=-1) / guided.norm(dim=-1)).unsqueeze(-1)
    weights = torch.randn_like(guided)
    parameters = list(policy.trainable_parameters().values())
    expected = torch.autograd.grad((guided * weights).sum(), parameters)
    velocity = policy.velocity(latents, sigma, conditions)
    found = torch.autograd.grad((velocity * weights).sum(), parameters)
    assert torch.allclose(velocity, guided, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_conditions_have_one_shape_for_all_prompts(folder: Folders) -> None:
    for case in ("flux", "qwen"):
        policy = load(folder, case)
        together = encoded(policy)
        sources = sources_of(policy)
        parts = [
            policy.encode([p], None if sources is None else [sources[n]])
            for n, p in enumerate(PROMPTS)
        ]
        joined = cat_conditions(parts)
        for name, tensor in together.items():
            assert torch.allclose(joined[name].float(), tensor.float(), atol=1e-5), name
        picked = select_conditions(together, torch.tensor([1, 1, 0]))
        assert torch.equal(picked["prompt_embeds"][0], together["prompt_embeds"][1])


@pytest.mark.parametrize("lora", [LoraOptions(4, 8), None], ids=["lora", "full"])
def test_bfloat16_policies_train_float32_weights(folder: Folders, lora: LoraOptions | None) -> None:
    policy = load(folder, "flux", dtype=torch.bfloat16, lora=lora)
    assert policy.dtype == torch.bfloat16
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
    schedule = build_schedule(policy.sigmas(4), "sde", 0.7)
    batch = PromptBatch((0, 1), PROMPTS, encoded(policy))
    result = Sampler(policy, schedule, SamplingConfig()).sample(batch)
    assert result.log_probs.dtype == torch.float32
    assert bool(result.log_probs[:, :-1].isfinite().all())
    policy.decode(result.final)
    latents, sigma = torch.ones(2, *policy.latent_shape), torch.tensor([0.9, 0.4])
    velocity = policy.velocity(latents, sigma, batch.conditions)
    assert velocity.dtype == torch.bfloat16
    with torch.no_grad(), policy.reference():
        reference = policy.velocity(latents, sigma, batch.conditions)
    assert torch.allclose(reference.float(), velocity.float(), atol=0.05)
    velocity.float().square().mean().backward()
    gradients = [p.grad for p in policy.trainable_parameters().values()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_gradient_checkpointing_changes_nothing(folder: Folders, tmp_path: Path) -> None:
    plain, checkpointed = load(folder, "flux"), load(folder, "flux", gradient_checkpointing=True)
    move_adapter(plain)
    plain.save(tmp_path)
    checkpointed.load(tmp_path)
    latents, sigma = torch.ones(2, *plain.latent_shape), torch.tensor([0.9, 0.4])
    gradients = []
    for policy in (plain, checkpointed):
        policy.velocity(latents, sigma, encoded(policy)).square().mean().backward()
        gradients.append([p.grad for p in policy.trainable_parameters().values()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_processor_without_video_is_the_processor(folder: Folders) -> None:
    components = processor_components(folder("qwen"))
    if not components:
        pytest.skip("torchvision is installed: the pipeline's own processor loads")
    processor = components["processor"]
    image = Image.new("RGB", (28, 112))
    inputs = processor(text=["a <|image_pad|> b", "c"], images=[image])
    ids = inputs["input_ids"]
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # 28 x 112 pixels are 2 x 8 patches of 14, merged two by two.
    assert int((ids[0] == pad).sum()) == 4 and int((ids[1] == pad).sum()) == 0
    with pytest.raises(ValueError, match="texts have 2 image placeholders, images 1"):
        processor(text=["<|image_pad|><|image_pad|>"], images=[image])


def test_bad_input(folder: Folders, tmp_path: Path) -> None:
    policy, editing = load(folder, "flux"), load(folder, "qwen")
    image = Image.new("RGB", (SIZE, SIZE))
    with pytest.raises(ValueError, match="text-to-image policy"):
        policy.encode(["a"], [image])
    with pytest.raises(ValueError, match="sources are missing"):
        editing.encode(["a"])
    with pytest.raises(ValueError, match="sources has 1 items, prompts has 2"):
        editing.encode(["a", "b"], [image])
    with pytest.raises(PromptTooLongError, match="max_sequence_length is 256"):
        editing.encode(["a red circle " * 200], [image])
    with pytest.raises(ValueError, match="latents have shape"):
        policy.decode(torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="multiples of 4"):
        load(folder, "flux", height=18)
    with pytest.raises(ValueError, match="true_cfg"):
        load(folder, "flux", true_cfg=0.5)
    with pytest.raises(ValueError, match="not guidance-distilled"):
        load(folder, "sd3", guidance=3.5)
    with pytest.raises(ValueError, match="rank"):
        LoraOptions(rank=0)
    with pytest.raises(UnsupportedModelError, match="FluxPipeline"):
        FluxPolicy.from_pretrained(folder("sd3"), height=SIZE, width=SIZE)
    with pytest.raises(ArrFastError, match="does not exist"):
        policy.load(tmp_path)
    load(folder, "flux", lora=LoraOptions(4, 8, ("to_q",))).save(tmp_path)
    with pytest.raises(ArrFastError, match="does not fit the policy"):
        policy.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(UnsupportedModelError, match=r"SanaPipeline.*FluxPipeline"):
        load_policy(tmp_path, height=SIZE, width=SIZE)


@pytest.mark.compile
@pytest.mark.parametrize("case", ["flux", "sd3", "qwen"])
def test_compiles_into_one_graph_each(folder: Folders, case: str) -> None:
    """Fullgraph rollout, training and reference of real architectures with an adapter."""
    from arr_fast.rpo.advantages import advantages, preferences
    from arr_fast.rpo.judging import Judgement
    from arr_fast.rpo.loss import Objective
    from arr_fast.rpo.packing import PackedRows
    from arr_fast.rpo.step import TrainStep, check_on_policy, graph_count

    torch._dynamo.reset()
    policy = load(folder, case)
    schedule = build_schedule(policy.sigmas(3), "sde", 0.7)
    sampler = Sampler(policy, schedule, SamplingConfig(train_steps=1), compile=True)
    objective = Objective(1e-3, 1e-3, 0.1, "latent_mean")
    step = TrainStep(policy, objective, compile=True)
    conditions, before = encoded(policy), graph_count()
    optimizer = torch.optim.SGD(policy.trainable_parameters().values(), lr=1.0)
    for epoch, winners in enumerate(([1, -1], [0, 1], [1, 1])):
        batch = PromptBatch((0, 1), PROMPTS, conditions, sources_of(policy), epoch=epoch)
        given = advantages(preferences(Judgement.from_pairs(winners)))
        report = step.accumulate(PackedRows([sampler.sample(batch)], [given], 2))
        assert report.skipped is None
        assert check_on_policy(report, objective) < 1e-5
        optimizer.step()
        optimizer.zero_grad()
    assert graph_count() - before == 3
