"""Training of the demo checkpoint, with a plan of seconds: every stage, interruption, and what is written."""

import dataclasses
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_fast import demo
from qwen_fast.demo import accuracy
from qwen_fast.demo.scenes import COLOURS, SHAPES, Request
from qwen_fast.demo.train import __main__ as training
from qwen_fast.demo.train import denoiser, few_steps, progress, text, vae
from qwen_fast.demo.train.plan import SCHEDULER_CONFIG, DecoderPlan, DenoiserPlan, FewStepsPlan, Plan, VAEPlan
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG

TINY = Plan(
    vae=VAEPlan(base_dim=2, steps=4, batch=2),
    decoder=DecoderPlan(steps=4, batch=2),
    denoiser=DenoiserPlan(layers=1, heads=1, head_dim=32, scenes=128, steps=4, batch=4),
    few_steps=FewStepsPlan(rank=2, trajectories=64, steps=4, batch=4),
)
CPU = torch.device("cpu")


def train(out: Path, plan: Plan = TINY) -> Path:
    return training.train(plan, out, CPU, pictures=2, keep_every=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("train")
    train(out)
    return out


def test_a_run_writes_a_checkpoint_that_stock_diffusers_draws_with(trained):
    checkpoint = trained / "checkpoint"
    demo.verify(checkpoint)
    pipe = accuracy.load_stock(checkpoint, CPU)
    assert type(pipe) is diffusers.QwenImagePipeline
    request = Request((("red", "circle"),), "blue")
    pictures, (verdict,) = accuracy.draw(pipe, [request], num_inference_steps=2)
    assert pictures.shape == (1, 64, 64, 3) and pictures.std() > 0 and not verdict.everything
    weights = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    card = (checkpoint / "README.md").read_text()
    assert "license: apache-2.0" in card and "| one, 64x64 | 2 |" in card and "| pair, 96x64 | 1 |" in card
    assert set(training._Stages(trained / "seconds.json").seconds) == {
        "vae",
        "latents",
        "text",
        "denoiser",
        "decoder",
        "few steps",
        "judge",
    }


def test_an_interrupted_run_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch):
    """Stopped between two states of each trained stage: what was done after the last state is done again."""
    stages = ("vae", "denoiser", "decoder", "few steps")
    steps, to_stop = [], {*stages}
    step = progress.Progress.step

    def stopped(self, done, *args, **losses):
        if self.stage in stages:
            steps.append((self.stage, done))
        if done == 3 and self.stage in to_stop:
            to_stop.remove(self.stage)
            raise KeyboardInterrupt
        step(self, done, *args, **losses)

    monkeypatch.setattr(progress.Progress, "step", stopped)
    for _ in stages:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    train(tmp_path)
    assert steps == [(stage, done) for stage in stages for done in (1, 2, 3, 3, 4)]
    for name in ("vae", "transformer", demo.LIGHTNING):
        (file,) = (path.relative_to(trained / "checkpoint") for path in (trained / "checkpoint" / name).glob("*.safetensors"))
        again, once = load_file(tmp_path / "checkpoint" / file), load_file(trained / "checkpoint" / file)
        assert again.keys() == once.keys() and all(torch.equal(again[key], once[key]) for key in once), name


def test_a_folder_of_another_plan_is_refused(trained):
    with pytest.raises(ValueError, match=r"plan\.json is of another plan"):
        train(trained, dataclasses.replace(TINY, seed=1))


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert training.main(["--out", str(tmp_path), "--device", "cpu"]) == 130
    assert f"the same command goes on from the last state in {tmp_path}" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text("{}")
    monkeypatch.undo()
    assert training.main(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "give another --out" in capsys.readouterr().err


def test_a_state_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "state.pt"
    assert progress.load_state(file) is None
    progress.save_state(file, {"step": 1})

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        progress.save_state(file, {"step": 2})
    assert progress.load_state(file) == {"step": 1}


def test_every_word_is_one_token_and_words_differ(tmp_path):
    tokenizer, encoder = text.build_text(TINY, tmp_path)
    prompts = [f"a {colour} {shape} on a red background" for colour in COLOURS if colour != "orange" for shape in SHAPES]
    features = text.encode_prompts(tokenizer, encoder, [text.NEGATIVE, *prompts, "two red crosses on a red background"])
    assert features.mask.sum(1).tolist() == [6, *[12] * len(prompts), 12]  # five tokens of the template follow a prompt
    for position in (1, 2):  # colour, shape
        words = {}
        for prompt in prompts:
            vector = features.values[features.index[prompt], position]
            words.setdefault(prompt.split()[position], []).append(vector / vector.norm())
        means = torch.stack([torch.stack(vectors).mean(0) for vectors in words.values()])
        assert (means.norm(dim=1) > 0.9).all(), "the words before a word hide it"
        cosines = means @ means.T / means.norm(dim=1).outer(means.norm(dim=1))
        assert (cosines - torch.eye(len(words))).abs().max() < 0.6


@pytest.mark.parametrize(("tokens", "mu"), [(16, 0.5), (24, 0.7)])
def test_noise_levels_are_those_of_the_schedule(tokens, mu):
    generator = torch.Generator().manual_seed(0)
    sigmas = denoiser.sample_sigmas(4096, tokens, generator)
    assert torch.equal(sigmas, sigmas.bfloat16().float()) and 0 < sigmas.min() and sigmas.max() <= 1
    expected = torch.sigmoid(torch.tensor(mu) + torch.linspace(0.001, 0.999, 4096).logit())
    assert (sigmas.sort().values - expected).abs().max() < 0.005


def test_only_the_decoder_alone_is_shown_held_out_scenes(tmp_path, monkeypatch):
    """The transformer's latents are the other place where scenes are drawn."""
    shown, sample = {}, vae.sample_request

    def spied(rng, **arguments):
        request = sample(rng, **arguments)
        shown.setdefault(stage, set()).add(request.held_out)
        return request

    monkeypatch.setattr(vae, "sample_request", spied)
    monkeypatch.setattr(denoiser, "sample_request", spied)
    plan = dataclasses.replace(TINY, vae=dataclasses.replace(TINY.vae, batch=16), decoder=DecoderPlan(steps=4, batch=16))
    stage = "vae"
    model = vae.train_vae(plan, tmp_path / "vae.pt", CPU)
    stage = "latents"
    denoiser.encode_scenes(plan, model, tmp_path / "latents.pt")
    stage = "decoder"
    vae.sharpen_decoder(plan, model, tmp_path / "decoder.pt", CPU)
    assert shown == {"vae": {False}, "latents": {False}, "decoder": {True, False}}


def test_losses_do_not_depend_on_contrast():
    generator = torch.Generator().manual_seed(0)
    picture, error = torch.rand(2, 1, 3, 8, 8, generator=generator)
    faint = 0.1 * picture + 0.4
    losses, fainter = (vae.reconstruction_losses(x + scale * error, x) for x, scale in ((picture, 1.0), (faint, 0.1)))
    assert torch.allclose(torch.stack(losses), torch.stack(fainter), rtol=1e-4)


@pytest.fixture
def one_latent():
    """A data set of a single latent, its features, and the latent."""
    latent = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    data = [denoiser.Latents(latent.half().repeat(8, 1, 1), (2, 2), ["a"] * 8)]
    values = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    features = text.Features(values, torch.tensor([[True, False, False], [True] * 3]), {text.NEGATIVE: 0, "a": 1})
    return data, features, latent


def test_the_denoiser_learns_to_go_where_the_schedule_goes(one_latent, tmp_path):
    """From noise down to the one latent that it was shown, by the steps of stock's scheduler."""
    data, features, latent = one_latent
    recipe = dataclasses.replace(TINY.denoiser, heads=3, steps=250, batch=16, learning_rate=3e-3)
    plan = dataclasses.replace(TINY, denoiser=recipe)
    model = denoiser.train_denoiser(plan, data, features, tmp_path / "state.pt", CPU, keep_every=1000)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER_CONFIG)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10), mu=0.2)  # of 4 tokens
    latents = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(3))
    for step in scheduler.timesteps:
        with torch.no_grad():
            velocity = model(
                hidden_states=latents,
                encoder_hidden_states=features.values[1:],
                encoder_hidden_states_mask=features.mask[1:],
                timestep=step[None] / 1000,
                img_shapes=[[(1, 2, 2)]],
                return_dict=False,
            )[0]
        latents = scheduler.step(velocity, step, latents, return_dict=False)[0]
    error = (latents[0] - latent).square().mean() / latent.square().mean()
    assert error < 0.1, error


def test_the_few_step_lora_learns_where_the_teacher_stands_next(tmp_path):
    """States of a teacher that does not go straight, reached by stock's scheduler in 4 steps; the model is left as it was."""
    generator = torch.Generator().manual_seed(1)
    noise, clean, bend = torch.randn(3, 1, 1, 4, 64, generator=generator)
    sigma = torch.tensor([1, 0.9, 0.75, 0.5, 0])[:, None, None]
    states = (torch.lerp(clean, noise, sigma) + sigma * (1 - sigma) * bend).half()
    data = [few_steps.Trajectories(states.repeat(8, 1, 1, 1), (2, 2), ["a"] * 8)]
    features = text.Features(torch.randn(1, 3, 64, generator=generator), torch.ones(1, 3, dtype=torch.bool), {"a": 0})
    plan = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, heads=3))
    plan = dataclasses.replace(plan, few_steps=FewStepsPlan(rank=16, steps=300, batch=16, learning_rate=3e-3))
    model = denoiser.build_transformer(plan).eval()
    for layer in (
        model.proj_out,
        model.norm_out.linear,
        *(model.transformer_blocks[0].get_submodule(f"{x}_mod.1") for x in ("img", "txt")),
    ):
        torch.nn.init.normal_(layer.weight, std=0.1, generator=generator)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora = few_steps.distil(plan, data, features, model, tmp_path / "state.pt", CPU, keep_every=1000)
    assert {weight.dtype for weight in lora.values()} == {torch.bfloat16}
    assert model.state_dict().keys() == before.keys() and all(
        torch.equal(model.state_dict()[name], before[name]) for name in before
    )

    def errors():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER_CONFIG)
        scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=LIGHTNING_SCHEDULER_CONFIG["base_shift"])
        latents, found = states[:, 0].float(), []
        for index, step in enumerate(scheduler.timesteps):
            with torch.no_grad():
                velocity = model(
                    hidden_states=latents,
                    encoder_hidden_states=features.values,
                    encoder_hidden_states_mask=features.mask,
                    timestep=step[None] / 1000,
                    img_shapes=[[(1, 2, 2)]],
                    return_dict=False,
                )[0]
            latents = scheduler.step(velocity, step, latents, return_dict=False)[0]
            found.append(float((latents - states[:, index + 1].float()).square().mean()))
        return found

    untrained = errors()
    pipe = diffusers.QwenImagePipeline(None, None, None, None, model)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=lora)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    trained = errors()
    assert all(after < before / 5 for after, before in zip(trained, untrained, strict=True)), (trained, untrained)


def test_trajectories_are_the_states_of_the_teacher_on_lightning_s_levels(trained, tmp_path):
    """Noise first; each state, given to stock's pipeline as the noise of the rest of the way, ends where the teacher ended."""
    teacher = accuracy.load_stock(trained / "checkpoint", CPU)
    data = few_steps.draw_trajectories(TINY, teacher, tmp_path / "trajectories.pt", CPU, batch=2)
    assert [(part.values.shape[1:], part.grid) for part in data] == [((5, 16, 64), (4, 4)), ((5, 24, 64), (4, 6))]
    assert [len(part.prompts) for part in data] == [round(64 * share) for share in TINY.shares]
    assert all(not Request.parse(prompt).held_out for part in data for prompt in part.prompts)
    part, call = data[0], {"negative_prompt": [" "] * 2, "true_cfg_scale": few_steps.TEACHER_GUIDANCE, "output_type": "latent"}
    seen = []

    def keep(pipe, step, _, tensors):
        seen.append(tensors["latents"])
        return {}

    call |= {"width": 64, "height": 64, "num_inference_steps": few_steps.TEACHER_STEPS, "callback_on_step_end": keep}
    teacher(part.prompts[:2], latents=part.values[:2, 0].float(), **call)
    expected = torch.stack([part.values[:2, 0].float(), *seen[4::5]], dim=1)
    assert (part.values[:2].float() - expected).abs().max() < 0.02 * expected.abs().max()  # bf16 on the way, fp16 kept
    assert [float(sigma) for sigma in teacher.scheduler.sigmas[::5]] == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)
    again = few_steps.draw_trajectories(TINY, teacher, tmp_path / "trajectories.pt", CPU, batch=2)
    assert all(torch.equal(a.values, b.values) and a.prompts == b.prompts for a, b in zip(again, data, strict=True))


def test_training_needs_peft_and_says_so_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    assert training.main(["--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "pip install peft" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dropped", "seen"), [(0.0, {1}), (1.0, {0}), (0.5, {0, 1})])
def test_dropped_captions_are_the_negative_prompt(one_latent, tmp_path, monkeypatch, dropped, seen):
    data, features, _ = one_latent
    found, build = set(), denoiser.build_transformer

    def spied(plan):
        transformer = build(plan)
        transformer.register_forward_pre_hook(look, with_kwargs=True)
        return transformer

    def look(_, __, call):
        for values, mask in zip(call["encoder_hidden_states"], call["encoder_hidden_states_mask"], strict=True):
            (index,) = [i for i in range(2) if torch.equal(values, features.values[i])]
            assert torch.equal(mask, features.mask[index])
            found.add(index)

    monkeypatch.setattr(denoiser, "build_transformer", spied)
    plan = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, dropped=dropped, steps=3, batch=8))
    denoiser.train_denoiser(plan, data, features, tmp_path / "state.pt", CPU)
    assert found == seen


def test_latents_are_packed_as_the_pipeline_unpacks_them(trained):
    model = diffusers.AutoencoderKLQwenImage.from_pretrained(trained / "checkpoint" / "vae", torch_dtype=torch.float32)
    pictures = vae.training_pictures(TINY, 0, 2)[1][..., :64]
    with vae.as_images(model):
        packed = vae.encode(model, pictures)
        again = vae.reconstruct(model, pictures)
    assert type(model) is diffusers.AutoencoderKLQwenImage
    latents = diffusers.QwenImagePipeline._unpack_latents(packed, 64, 64, 8)
    mean, std = (torch.tensor(model.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = model.decode(latents * std + mean).sample[:, :, 0] / 2 + 0.5
    assert torch.allclose(again, expected, atol=1e-4)


def test_the_dropped_caption_is_the_pipeline_s_negative_prompt(trained):
    pipe = accuracy.load_stock(trained / "checkpoint", CPU)
    features = text.encode_prompts(pipe.tokenizer, pipe.text_encoder, [text.NEGATIVE, "a red circle on a blue background"])
    embeds, mask = pipe.encode_prompt(" ", device=CPU)
    length = embeds.shape[1]
    assert mask is None and features.mask[0].sum() == length
    assert torch.allclose(features.values[0, :length], embeds[0], atol=1e-5)


@pytest.mark.parametrize("damage", ["changed", "missing", "no list", "list"])
def test_damage_is_named_with_its_cure(trained, tmp_path, damage):
    folder = tmp_path / "checkpoint"
    file = folder / "vae" / "config.json"
    for path in (trained / "checkpoint").rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(trained / "checkpoint")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    demo.verify(folder)
    if damage == "changed":
        file.write_bytes(file.read_bytes() + b" ")
    elif damage == "missing":
        file.unlink()
    else:
        file = folder / demo.CHECKSUMS
        file.unlink() if damage == "no list" else file.write_text("nonsense\n")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        demo.verify(folder)
    assert str(file) in str(caught.value) and "python -m qwen_fast.demo.train --out FOLDER" in str(caught.value)


def test_the_table_leaves_out_what_was_not_asked():
    verdict = demo_verdict(size=None)
    assert accuracy.table({"one": [verdict, demo_verdict(size=None, shape=False)]}).splitlines()[-1] == (
        "| one | 2 | 100.0 | 100.0 | 100.0 | 50.0 | 100.0 |  | 100.0 | 100.0 |"
    )


def demo_verdict(**parts):
    from qwen_fast.demo.judge import Verdict

    return Verdict(**{"count": True, "background": True, "colour": True, "shape": True, "both": True, "place": True} | parts)


def test_seeds_do_not_depend_on_the_batch(trained):
    pipe = accuracy.load_stock(trained / "checkpoint", CPU)
    wanted = accuracy.held_out_requests(3, "same")
    assert all(request.held_out for request in wanted)
    call = {"num_inference_steps": 2, "true_cfg_scale": 1.0, "negative_prompt": None}
    together = accuracy.draw(pipe, wanted, **call)[0]
    alone = accuracy.draw(pipe, wanted, batch=1, **call)[0]
    assert np.abs(together.astype(int) - alone).max() <= 1
