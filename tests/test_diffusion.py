"""The diffusion process and the sampler, against diffusers and closed forms."""

import numpy as np
import pytest
import torch
from conftest import Predictor, awake
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler

import script_unet
from script_unet import (FashionMNISTUNetDenoiser, diffusion_loss, guidance, posterior,
                         predict_x_start, q_sample, sample, x_start_from_v)

KINDS = ("cosine", "linear")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(script_unet, "PRECISION", "fp32")
    monkeypatch.setattr(script_unet, "GUIDANCE_SCALE", 1.0)
    monkeypatch.setattr(script_unet, "SAMPLING_GRAIN", 0)


def oracle(scheduler, kind, steps, **options):
    """A scheduler of diffusers, given nothing that script_unet computed."""
    if kind == "cosine":
        options["beta_schedule"] = "squaredcos_cap_v2"
    else:
        betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
        options["trained_betas"] = betas.clip(max=0.999).tolist()
    return scheduler(steps, **options)


def abar_of(kind, steps):
    return Predictor(None, steps, kind).abar


def random_images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(value, expected, tolerance=2e-5):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


# The schedule, the forward process and one reverse step

@pytest.mark.parametrize("kind", KINDS)
def test_schedule_falls_to_noise_for_every_number_of_steps(kind):
    for steps in (*range(2, 1001), 3000, 10_000):
        abar = abar_of(kind, steps)
        assert abar.shape == (steps,) and abar.dtype == torch.float32
        assert 0 < abar[-1] < 1e-3, steps
        assert abar[0] < 1 and (abar.diff() < 0).all(), steps


@pytest.mark.parametrize("steps", [2, 7, 100, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_schedule_is_that_of_diffusers(kind, steps):
    expected = oracle(DDPMScheduler, kind, steps).alphas_cumprod
    # diffusers rounds the betas to float32, which 1 - 0.999 magnifies
    torch.testing.assert_close(abar_of(kind, steps), expected, rtol=2e-4, atol=1e-7)


def test_schedule_of_some_constants_takes_the_others_as_they_are(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "BETA_SCHEDULE", "linear")
    abar = tiny.alphas_cumprod({"NUM_DIFFUSION_STEPS": 50})
    torch.testing.assert_close(abar, abar_of("linear", 50))


@pytest.mark.parametrize("kind", KINDS)
def test_q_sample_and_v_are_those_of_diffusers_at_all_t(kind):
    abar, diffusers = abar_of(kind, 100), oracle(DDPMScheduler, kind, 100)
    x_start, noise = random_images(2, 100, 1, 5, 5)
    t = torch.arange(100)
    x_t = q_sample(x_start, t, noise, abar)
    close(x_t, diffusers.add_noise(x_start, noise, t))
    v = diffusers.get_velocity(x_start, noise, t)
    close(x_start_from_v(x_t, t, v, abar), x_start)


def test_q_sample_has_the_constants_schedule_unless_told_another(tiny):
    x_start, noise = random_images(2, 20, 1, 5, 5)
    t = torch.arange(tiny.NUM_DIFFUSION_STEPS)
    diffusers = oracle(DDPMScheduler, "cosine", 20)
    close(q_sample(x_start, t, noise), diffusers.add_noise(x_start, noise, t))


def test_q_sample_without_noise_draws_standard_noise(tiny):
    t = torch.full((4,), tiny.NUM_DIFFUSION_STEPS - 1)
    drawn = q_sample(torch.zeros(4, 1, 64, 64), t)
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05
    assert not torch.equal(drawn, q_sample(torch.zeros(4, 1, 64, 64), t))


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_of_neighbours_is_ddpms_at_all_t(kind):
    abar = abar_of(kind, 100).tolist() + [1.0]
    diffusers = oracle(DDPMScheduler, kind, 100, prediction_type="sample", clip_sample=False)
    x_start, x_t = random_images(2, 1, 1, 5, 5)
    for t in range(100):
        mean, std = posterior(x_start, x_t, abar[t], abar[t - 1])
        draw = torch.Generator().manual_seed(t)
        expected = diffusers.step(x_start, t, x_t, generator=draw.clone_state()).prev_sample
        close(mean + std * torch.randn(x_t.shape, generator=draw), expected, 1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_posterior_of_distant_steps_is_ddims(kind, stride, eta):
    abar = abar_of(kind, 100).tolist()
    diffusers = oracle(DDIMScheduler, kind, 100, prediction_type="sample", clip_sample=False)
    diffusers.set_timesteps(100 // stride)
    x_start, x_t, noise = random_images(3, 1, 1, 5, 5)
    for t in range(100):
        mean, std = posterior(x_start, x_t, abar[t], abar[t - stride] if t >= stride else 1, eta)
        close(mean + std * noise, diffusers.step(
            x_start, t, x_t, eta=eta, variance_noise=noise).prev_sample)


def test_posterior_of_next_to_nothing_is_finite():
    for abar in np.linspace(0.01, 0.99, 99):    # rounding must not make a variance negative
        mean, std = posterior(torch.ones(1), torch.ones(1), 1e-29, float(abar))
        assert mean.isfinite().all() and np.isfinite(std)


# The loss

def loss_and_plain_error(error):
    """diffusion_loss of a prediction x_start + error, and the plain mean error of v at t = 0 ...
    99: its square, but at t = 0 its size. The model must be asked about x_t, t and the labels."""
    x_start = random_images(100, 1, 8, 8).clamp(-1, 1)          # a third lies on an end
    noise, t = random_images(100, 1, 8, 8, seed=1), torch.arange(100)
    diffusers = oracle(DDPMScheduler, "cosine", 100)
    x_t, labels, asked = diffusers.add_noise(x_start, noise, t), t % 10, []

    def predicted_x_start(*seen):
        asked.append(seen)
        return x_start + error(x_start)

    model = Predictor(predicted_x_start)
    plain = model(x_t, t, labels) - diffusers.get_velocity(x_start, noise, t)
    plain = torch.cat([plain[:1].abs(), plain[1:].square()]).mean((1, 2, 3))
    loss = diffusion_loss(model, x_start, t, labels, noise)
    for seen, wanted in zip(asked[-1], asked[0]):
        close(seen, wanted)
    return loss, plain


def test_loss_is_the_plain_error_of_v_where_nothing_overshoots():
    inward = loss_and_plain_error(lambda x_start: -0.3 * x_start)
    torch.testing.assert_close(*inward, rtol=1e-3, atol=1e-6)
    beyond_but_not_on_an_end = loss_and_plain_error(
        lambda x_start: 1.5 * x_start.sign() * (x_start.abs() < 1))
    torch.testing.assert_close(*beyond_but_not_on_an_end, rtol=1e-3, atol=1e-6)


def test_loss_of_overshoot_is_nothing():
    loss, plain = loss_and_plain_error(lambda x_start: x_start * (x_start.abs() == 1))
    assert (plain > 0.05).all() and loss.abs().max() < 1e-6


def test_best_answer_is_the_median_at_the_last_step_and_the_mean_before():
    x_start = torch.tensor([-1.0, -1, -1, 0.2, 0.6]).view(5, 1, 1, 1).expand(-1, -1, 8, 8)
    noise, answers = torch.zeros_like(x_start), torch.linspace(-1, 1, 201)
    for t, best in ((0, -1.0), (1, -0.44), (99, -0.44)):    # of -1, -1, -1, 0.2 and 0.6
        losses = [diffusion_loss(Predictor(lambda x_t, t, labels, x=x: x + 0 * x_t), x_start,
                                 torch.full((5,), t), None, noise).mean() for x in answers]
        assert answers[torch.stack(losses).argmin()].item() == pytest.approx(best, abs=0.011)


def test_bf16_is_for_the_networks_inside_alone(tiny, monkeypatch):
    x_t, t, labels = random_images(20, 1, 28, 28), torch.arange(20), torch.arange(20) % 10
    monkeypatch.setattr(tiny, "PRECISION", "bf16")
    untrained = FashionMNISTUNetDenoiser().eval()   # v = 0
    a = untrained.abar.view(-1, 1, 1, 1)
    close(predict_x_start(untrained, x_t, t, labels), a.sqrt() * x_t, 1e-6)
    model = awake(untrained)
    rounded = predict_x_start(model, x_t, t, labels)
    monkeypatch.setattr(tiny, "PRECISION", "fp32")
    difference = (rounded - predict_x_start(model, x_t, t, labels)) / (1 - a).sqrt()
    assert rounded.dtype == torch.float32 and 0 < difference.square().mean().sqrt() < 0.05


# Sampling: what comes out

def gaussian(mean, std, **options):
    """The true predictor, E[x_start | x_t], of x_start ~ N(mean, std^2)."""
    def x_start(x_t, t, labels):
        a = model.abar[t].view(-1, 1, 1, 1)
        return mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (x_t - a.sqrt() * mean)

    model = Predictor(x_start, **options)
    return model


@pytest.mark.parametrize("eta, steps", [(1.0, 1000), (0.5, 1000), (0.0, 100)])
def test_reverse_run_with_the_true_predictor_reaches_the_gaussian(eta, steps):
    mean, std = 0.1, 0.25       # that clipping at -1 and 1 does not touch
    images = sample(gaussian(mean, std, steps=steps, size=64), [0] * 8, steps=steps, eta=eta)
    assert images.mean().item() == pytest.approx(mean, abs=0.01)
    assert images.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("steps, error", [(24, 0.003), (100, 0.0008)])
def test_deterministic_sampling_follows_the_probability_flow(steps, error):
    mean, std = 0.1, 0.15       # x_start ~ N(mean, std^2), of which the flow is linear
    model = gaussian(mean, std, steps=100)
    ((_, x_t), *_), images = frames_of(model, [0] * 4, steps=steps, eta=0.0)
    a, a_last = model.abar[-1].double(), model.abar[0].double()
    spread = [(b * std**2 + 1 - b).sqrt() for b in (a, a_last)]
    x_last = a_last.sqrt() * mean + spread[1] / spread[0] * (x_t - a.sqrt() * mean)
    expected = model.x_start(x_last, torch.zeros(4, dtype=int), None)
    assert (images - expected).square().mean().sqrt() < error  # without corrector twice as large


def wavy(x_t, t, labels):
    """A smooth, non-linear x_start that overshoots both ends."""
    return 1.4 * torch.sin(1.3 * x_t + t.view(-1, 1, 1, 1) / 40 + labels.view(-1, 1, 1, 1))


def frames_of(model, labels, **options):
    """[(t, x_t)] as sample's callback sees them, and its result."""
    frames = []
    result = sample(model, labels, callback=lambda t, x_t: frames.append((t, x_t.clone())),
                    **options)
    return frames, result


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' with numpy 2
@pytest.mark.parametrize("grain", [0, 1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 20, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_sampling_is_diffusers_second_order_solver_with_a_corrector(
        kind, steps, grain, monkeypatch):
    monkeypatch.setattr(script_unet, "SAMPLING_GRAIN", grain)
    labels, last = torch.arange(5), (grain / 127.5) ** 2    # the variance of the noise that is left
    frames, _ = frames_of(Predictor(wavy, kind=kind), labels, steps=steps, eta=0.0)
    solver = oracle(UniPCMultistepScheduler, kind, 100, prediction_type="sample")
    solver.set_timesteps(len(frames) - 1)
    solver.timesteps = torch.tensor([t for t, _ in frames[:-1]])    # ours, not its own
    abar = solver.alphas_cumprod[solver.timesteps]
    solver.sigmas = torch.cat([(1 - abar) / abar, torch.tensor([last / (1 - last)])]).sqrt()
    x_t = frames[0][1]
    for (t, _), (_, x_next) in zip(frames, frames[1:]):
        x_start = wavy(x_t, torch.full_like(labels, t), labels).clamp(-1, 1)
        x_t = solver.step(x_start, t, x_t).prev_sample
        solver.this_order = 1   # of its corrector: from x_start at the two ends of a step alone
        if x_next is frames[-1][1]:     # the image
            level = 127.5 * (x_start + 1)       # 0, black, to 255; the grain sets in from 0.5 on
            x_t = (x_start + (level - 0.5).clamp(0, 1) * (x_t - x_start)).clamp(-1, 1)
        close(x_next, x_t, 1e-3)


@pytest.mark.parametrize("eta, steps", [(1.0, 100), (1.0, 10), (0.5, 10)])
def test_random_sampling_adds_fresh_noise_to_the_solvers_steps(eta, steps):
    labels = torch.arange(10)
    frames, _ = frames_of(Predictor(wavy), labels, steps=steps, eta=eta)
    abar = oracle(DDPMScheduler, "cosine", 100).alphas_cumprod.double()
    noises, before = [], None
    for (t, x_t), (t_next, x_next) in zip(frames, frames[1:-1]):  # the last step adds none
        x_start = wavy(x_t, torch.full_like(labels, t), labels).clamp(-1, 1)
        a, a_next = abar[t], abar[t_next]
        now, then = (b.sqrt().log() - (1 - b).sqrt().log() for b in (a, a_next))
        previous, before = before, (now, x_start)
        if eta < 1 and previous:    # second order: x_start half a step further on its way
            slope = (x_start - previous[1]) / (now - previous[0])
            x_start = x_start + slope * (then - now) / 2
        std = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        direction = (x_t - a.sqrt() * x_start) / (1 - a).sqrt()
        mean = a_next.sqrt() * x_start + (1 - a_next - std**2).sqrt() * direction
        noises.append(((x_next - mean) / std).flatten())
    noises = torch.stack(noises)
    assert noises.mean(1).abs().max() < 0.06 and (noises.std(1) - 1).abs().max() < 0.05
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.06


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_overshooting_background_comes_out_exactly_black(eta):
    dark = Predictor(lambda x_t, t, labels: 0.01 * x_t - 1.2)
    images = sample(dark, [0, 1, 2], steps=10, eta=eta)
    assert (images == -1).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("grain", [0, 0.5, 1.0, 3.0])
def test_grain_is_noise_of_so_many_gray_levels_on_clothes_and_none_on_black(
        monkeypatch, grain, eta):
    monkeypatch.setattr(script_unet, "SAMPLING_GRAIN", grain)
    clothes = torch.tensor([-1, -1 + 0.9 / 255, -1 + 9 / 127.5, 0, 0.5, 1]).repeat(10)[None, :60]
    model = Predictor(lambda x_t, t, labels: clothes + 0 * x_t, size=60)
    images = sample(model, [0] * 100, steps=10, eta=eta)
    black, dark, gray = images[..., 0::6], images[..., 1::6], images[..., 3::6]
    assert (black == -1).all() and (dark == -1 + 0.9 / 255).all()
    assert 127.5 * gray.std().item() == pytest.approx(grain, rel=0.02, abs=1e-4)
    assert 127.5 * gray.mean().abs() < 0.05
    assert images.abs().max() <= 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_grain_is_never_more_than_the_noise_of_the_last_step(monkeypatch, kind, eta):
    monkeypatch.setattr(script_unet, "SAMPLING_GRAIN", 100.0)
    model = Predictor(lambda x_t, t, labels: 0 * x_t, kind=kind, size=64)
    images = sample(model, [0] * 8, steps=10, eta=eta)
    assert images.std().item() == pytest.approx((1 - model.abar[0]).sqrt().item(), rel=0.02)


@pytest.fixture
def model(tiny):
    """A model with a guide, of which guidance_scale=1, the constant here, takes no notice."""
    model, guide = (awake(FashionMNISTUNetDenoiser(), seed) for seed in (0, 1))
    model.guide = (guide,)
    return model


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_images_lie_between_minus_one_and_one(model, eta, steps):
    images = sample(model, torch.arange(10), steps=steps, eta=eta, guidance_scale=3.0)
    assert images.shape == (10, 1, 28, 28) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and images.std() > 0


@pytest.mark.parametrize("eta, scale", [(0.0, 1.0), (1.0, 2.0)])
def test_image_i_depends_on_seed_and_i_alone(model, eta, scale, monkeypatch):
    monkeypatch.setattr(script_unet, "SAMPLING_GRAIN", 1.0)
    labels = torch.arange(100) % 10
    options = {"eta": eta, "guidance_scale": scale, "seed": 5, "steps": 3}
    images = sample(model, labels, **options)
    for count, batch_size in ((100, 33), (30, 1), (7, 4), (1, 500)):
        few = sample(model, labels[:count], batch_size=batch_size, **options)
        torch.testing.assert_close(few, images[:count], rtol=0, atol=1e-4)
    assert (sample(model, labels[:7], **{**options, "seed": 6}) - images[:7]).abs().max() > 0.1
    assert torch.equal(sample(model, labels, **{**options, "seed": np.arange(6)[-1]}), images)
    same_label = sample(model, [0, 0], **options)
    assert (same_label[0] - same_label[1]).abs().max() > 0.1
    starts = [frames_of(model, some, **options)[0][0][1] for some in ([3, 5, 8], [0, 0, 0])]
    assert torch.equal(*starts)     # whatever the classes


def test_images_of_neighbouring_seeds_have_no_noise_in_common(model):
    noises = []
    for seed in (5, 6):
        sample(model, [0] * 8, steps=1, guidance_scale=1.0, seed=seed,
               callback=lambda t, x_t: noises.append(x_t.flatten(1)) if t >= 0 else None)
    assert torch.cdist(*noises).min() > 20      # about 40 = sqrt(2 * 28 * 28)


def test_no_two_of_thousands_of_images_start_from_the_same_noise():
    starts = frames_of(Predictor(lambda x_t, t, labels: 0 * x_t, size=16), [0] * 2000, steps=1,
                       guidance_scale=1.0)[0][0][1]
    assert len(starts.flatten(1).unique(dim=0)) == 2000


@pytest.mark.parametrize("eta, scale", [(0.0, 1.0), (1.0, 2.0)])
def test_no_labels_give_no_images(model, eta, scale):
    images = sample(model, torch.arange(0), eta=eta, guidance_scale=scale)
    assert images.shape == (0, 1, 28, 28)


@pytest.mark.parametrize("labels", [[3, 5], np.array([3, 5], np.uint8), []])
def test_labels_may_be_a_list_or_small_integers(model, labels):
    wanted = torch.tensor([int(label) for label in labels], dtype=torch.long)
    assert torch.equal(sample(model, labels), sample(model, wanted))


def test_unnamed_options_are_the_constants(model, monkeypatch):
    options = {"SAMPLING_STEPS": 3, "SAMPLING_ETA": 0.7, "GUIDANCE_SCALE": 2.5, "SEED": 9}
    named = sample(model, [1, 2], steps=3, eta=0.7, guidance_scale=2.5, seed=9)
    zeros = sample(model, [1, 2], steps=3, eta=0.0, guidance_scale=2.5, seed=0)
    assert not torch.equal(sample(model, [1, 2]), named)
    for name, value in options.items():
        monkeypatch.setattr(script_unet, name, value)
    assert torch.equal(sample(model, [1, 2]), named)
    assert torch.equal(sample(model, [1, 2], eta=0.0, seed=0), zeros)   # 0 is a value as well


@pytest.mark.parametrize("steps, calls", [(1, 1), (2, 2), (9, 9), (1000, 20)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_callback_sees_every_step_from_noise_to_image(model, eta, steps, calls):
    frames, result = frames_of(model, torch.arange(3), steps=steps, eta=eta)
    times = [t for t, _ in frames]
    assert len(times) == calls + 1 and times[0] == 19 and times[-1] == -1
    assert times == sorted(set(times), reverse=True) and (steps == 1 or times[-2] == 0)
    assert all(x_t.shape == result.shape for _, x_t in frames)
    assert abs(frames[0][1].std() - 1) < 0.1 and torch.equal(frames[-1][1], result)


@pytest.mark.parametrize("total", [2, 3, 20, 47, 100])
def test_as_many_different_steps_are_visited_as_are_asked_for(total):
    model = Predictor(lambda x_t, t, labels: 0 * x_t, steps=total, size=16)
    for steps in range(2, total + 1):
        times = [t for t, _ in frames_of(model, [0], steps=steps, eta=0.0)[0]]
        assert times == sorted(set(times), reverse=True) and len(times) == steps + 1
        assert (times[0], times[-2]) == (total - 1, 0)


def test_gaps_between_steps_are_narrowest_at_both_ends_and_widest_half_way():
    model = Predictor(lambda x_t, t, labels: 0 * x_t, steps=100, size=16)
    times = [t for t, _ in frames_of(model, [0], steps=20, eta=0.0)[0]]
    gaps = -np.diff(times[:-1])
    assert gaps[:3].sum() == gaps[-3:].sum() < gaps[8:11].sum() / 2 and gaps[0] == 2
    # 22 of 100: i / 21 + .78 of the cubic, worked out by hand
    times = [t for t, _ in frames_of(model, [0], steps=22, eta=0.0)[0]]
    assert times == [99, 97, 95, 92, 88, 83, 77, 72, 66, 59, 53,
                     46, 40, 33, 27, 22, 16, 11, 7, 4, 2, 0, -1]


# Guidance

@pytest.mark.parametrize("scale", [0.5, 1.001, 4.0])
def test_guidance_extrapolates_from_the_guide_to_the_model(scale):
    model, guide = Predictor(wavy), Predictor(lambda x_t, t, labels: 1.2 * torch.cos(x_t))
    model.guide = (guide,)
    (_, x_t), (_, image) = frames_of(model, [1, 2], steps=1, guidance_scale=scale)[0]
    weak, strong = (predict_x_start(part, x_t, torch.tensor([99, 99]), torch.tensor([1, 2]))
                    for part in (guide, model))
    assert strong.abs().max() > 1.2     # else nothing could be seen of clipping
    weak, strong = weak.clamp(-1, 1), strong.clamp(-1, 1)
    close(image, (weak + scale * (strong - weak)).clamp(-1, 1), 1e-4)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guidance_is_the_same_at_every_step_and_by_the_guide_of_the_same_class(scale):
    def weak(x_t, t, labels):
        return 1.2 * torch.cos(x_t + labels.view(-1, 1, 1, 1))

    def guided(*asked):     # clipped by sample() as any prediction
        weaker, stronger = weak(*asked).clamp(-1, 1), wavy(*asked).clamp(-1, 1)
        return weaker + scale * (stronger - weaker)

    model, options = Predictor(wavy), {"steps": 10, "eta": 0.0}
    model.guide = (Predictor(weak),)
    close(sample(model, [1, 2, 7], guidance_scale=scale, **options),
          sample(Predictor(guided), [1, 2, 7], guidance_scale=1.0, **options), 1e-3)


def test_background_that_model_and_guide_both_overshoot_stays_black():
    model, guide = (Predictor(lambda x_t, t, labels, x=x: x + 0 * x_t) for x in (-1.2, -1.6))
    model.guide = (guide,)
    assert (sample(model, [0, 1], steps=10, guidance_scale=2.0) == -1).all()


def test_model_without_a_guide_is_its_own_and_unchanged(tiny):
    model = awake(FashionMNISTUNetDenoiser())
    options = {"steps": 4, "eta": 0.0}
    close(sample(model, [1, 2], guidance_scale=3.0, **options),
          sample(model, [1, 2], guidance_scale=1.0, **options), 1e-4)


@pytest.mark.parametrize("epochs, scale", [(0, 2.805), (8, 2.805), (20, 1.98), (100, 1.54)])
def test_longer_training_needs_less_guidance(model, monkeypatch, epochs, scale):
    model.epochs.fill_(epochs)
    named, by_constant = sample(model, [1], 3, guidance_scale=scale), sample(model, [1], 3)
    monkeypatch.setattr(script_unet, "GUIDANCE_SCALE", 0.0)
    assert guidance(model) == pytest.approx(scale)
    close(sample(model, [1], 3), named)
    close(sample(model, [1], 3, guidance_scale=0), named)
    assert (named - by_constant).abs().max() > 1e-3     # by GUIDANCE_SCALE = 1, whatever the epochs


def test_a_model_that_counts_no_epochs_samples_with_a_named_scale(monkeypatch):
    monkeypatch.setattr(script_unet, "GUIDANCE_SCALE", 0.0)
    predictor = Predictor(lambda x_t, t, labels: 0.5 + 0 * x_t)
    close(sample(predictor, [0], guidance_scale=1.0), torch.full((1, 1, 28, 28), 0.5))


@pytest.mark.parametrize("scale, calls", [(1.0, 5), (1.5, 10)])
def test_guidance_of_one_costs_one_evaluation_a_step_and_another_two(model, scale, calls):
    sizes = []
    for part in (model, *model.guide):
        part.register_forward_hook(lambda _model, _args, v: sizes.append(len(v)))
    sample(model, torch.arange(6), steps=5, guidance_scale=scale)
    assert sizes == [6] * calls
