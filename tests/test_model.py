"""The building blocks and the model: shapes, alignment, attention, size, normalization."""

import copy
import hashlib
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TINY, awake, checkpoint
from torch.utils.flop_counter import FlopCounterMode

import script_unet
from script_unet import (DoubleConv, Down, FashionMNISTUNetDenoiser, PatchConv, PatchExpand,
                         ResBlock, SelfAttention, Trainer, Up, diffusion_loss, load_denoiser,
                         model_size, refresh_batch_norm, sample, time_embedding, to_float)

SIZES = [(1, 1), (4, 4), (5, 7), (7, 5), (8, 6), (13, 11)]


def operations(module, *inputs):
    """Floating-point operations of module(*inputs), in eval mode."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return counter.get_total_flops()


# Blocks

@pytest.mark.parametrize("patch", [1, 2, 3, 4])
@pytest.mark.parametrize("height, width", SIZES)
def test_patch_conv_makes_one_cell_a_patch_which_expand_with_inverse_weights_undoes(
        height, width, patch):
    there, back = PatchConv(1, patch**2, patch), PatchExpand(patch**2, 1, patch)
    draw = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(patch**2, patch**2, generator=draw))[0]
    for module, matrix in ((there, mix), (back, mix.T)):
        for p in module.parameters():
            p.data = matrix.reshape(p.shape) if p.ndim > 1 else torch.zeros_like(p)
    x = torch.randn(2, 1, height, width)
    cells = there(x)
    assert cells.shape == (2, patch**2, -(-height // patch), -(-width // patch))
    torch.testing.assert_close(back(cells, (height, width)), x)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_of_several_channels_are_strided_convolutions(patch):
    there, back = PatchConv(3, 5, patch), PatchExpand(5, 3, patch)
    x, cells = torch.randn(2, 3, 4 * patch, 2 * patch), torch.randn(2, 5, 4, 2)
    weight = there.conv.weight.view(5, patch, patch, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(there(x), nn.functional.conv2d(x, weight, stride=patch))
    weight = back.conv.weight.view(patch, patch, 3, 5).permute(3, 2, 0, 1)
    torch.testing.assert_close(back(cells, x.shape[-2:]), nn.functional.conv_transpose2d(
        cells, weight, stride=patch))


@pytest.mark.parametrize("patch", [2, 3, 4])
def test_padding_is_shared_evenly_between_the_sides(patch):
    module = PatchConv(1, 1, patch).requires_grad_(False)
    for p in module.parameters():
        p.fill_(1.0 if p.ndim > 1 else 0.0)     # a cell counts the pixels of the image in it
    for size in range(1, 14):
        pixels = module(torch.ones(1, 1, size, size))[0, 0].diagonal().sqrt().round().tolist()
        assert sum(pixels) == size and all(count == patch for count in pixels[1:-1])
        assert len(pixels) == 1 or 0 <= pixels[0] - pixels[-1] <= 1


def double_conv_in_float64(block, separable, x, emb):
    """What a DoubleConv in eval mode computes, from its weights, in elementary operations."""
    block, x = copy.deepcopy(block).double(), x.double()

    def hard_swish(x):
        return x * (x + 3).clamp(0, 6) / 6

    def normal(norm, x):
        mean, var = (part[:, None, None] for part in (norm.running_mean, norm.running_var))
        return (x - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + (
            norm.bias[:, None, None])

    def conv(module, x):
        return nn.functional.conv2d(x, module.weight, module.bias, groups=module.groups,
                                    padding=module.kernel_size[0] // 2)

    convs = [part for part in (*block.first, *block.second) if isinstance(part, nn.Conv2d)]
    if not separable:
        x = hard_swish(normal(block.first[0], x))
    scale, shift = (emb.double() @ block.scale_shift.weight.T
                    + block.scale_shift.bias)[..., None, None].chunk(2, dim=1)
    x = normal(block.norm, conv(convs[0], x)) * (1 + scale) + shift
    if separable:
        x = conv(convs[1], x)
    return conv(convs[-1], hard_swish(x))


@pytest.mark.parametrize("kind", [(False, 3), (False, 1), (True, 3)])
def test_double_conv_is_its_formula(kind):
    x, emb, block = torch.randn(2, 8, 5, 7), torch.randn(2, 12), DoubleConv(8, 12, 0.0, *kind)
    awake(block).train()(torch.randn(9, 8, 5, 7), torch.randn(9, 12))   # moves the statistics
    expected = double_conv_in_float64(block.eval(), kind[0], x, emb)
    torch.testing.assert_close(block(x, emb).double(), expected, rtol=1e-4, atol=1e-5)
    residual = ResBlock(8, 12, 0.0, *kind).eval()
    residual.double_conv.load_state_dict(block.state_dict())
    torch.testing.assert_close(residual(x, emb).double(), x + expected, rtol=1e-4, atol=1e-5)


def test_untrained_residual_parts_are_the_identity():
    x, emb = torch.randn(2, 8, 5, 7), torch.randn(2, 12)
    for mode in (True, False):
        assert torch.equal(SelfAttention(8, 4).train(mode)(x), x)
        for kind in ((False, 3), (False, 1), (True,)):
            assert torch.equal(ResBlock(8, 12, 0.0, *kind).train(mode)(x, emb), x)
            assert not DoubleConv(8, 12, 0.0, *kind).train(mode)(x, emb).any()


@pytest.mark.parametrize("separable, kernel, blind", [(False, 3, 0), (False, 1, 1), (True, 3, 1)])
def test_each_output_of_a_block_sees_three_by_three_pixels_a_convolution(separable, kernel, blind):
    block, emb = awake(DoubleConv(4, 8, 0.0, separable, kernel)), torch.randn(1, 8)
    x, touched = torch.randn(1, 4, 9, 9), torch.randn(1, 4, 9, 9)
    touched[..., 3:6, 3:6] = x[..., 3:6, 3:6]
    same = (block(x, emb) - block(touched, emb)).abs().amax((0, 1)) < 1e-6
    inner = torch.zeros(9, 9, dtype=torch.bool)
    inner[4, 4] = blind         # with one 3 x 3 convolution; with two, it sees 5 x 5
    assert torch.equal(same, inner)


def test_a_separable_block_costs_a_quarter():
    inputs = torch.zeros(1, 64, 14, 14), torch.zeros(1, 32)
    dense, separable = (operations(DoubleConv(64, 32, 0.0, separable), *inputs)
                        for separable in (False, True))
    assert separable < dense / 4


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("block", [DoubleConv, ResBlock])
def test_dropout_acts_in_training_alone(block, separable):
    module, x, emb = awake(block(8, 4, 0.5, separable)), torch.randn(2, 8, 6, 6), torch.randn(2, 4)
    assert torch.equal(module(x, emb), module(x, emb))
    module.train()
    assert not torch.equal(module(x, emb), module(x, emb))


@pytest.mark.parametrize("kind", [(False, 3), (False, 1), (True, 3)])
def test_dropout_is_of_what_the_last_convolution_takes(kind):
    block, taken = awake(DoubleConv(8, 12, 0.5, *kind)), []
    block.second[-1].register_forward_pre_hook(lambda _conv, args: taken.append(args[0]))
    x, emb = torch.randn(2, 8, 5, 7), torch.randn(2, 12)
    block(x, emb)
    dropout, = (part for part in block.modules() if isinstance(part, nn.Dropout))
    dropout.train()
    block(x, emb)
    whole, dropped = taken
    torch.testing.assert_close(dropped[dropped != 0], 2 * whole[dropped != 0])
    assert 0.3 < (dropped != 0).float().mean() < 0.6


def test_blocks_run_one_after_another_on_the_way_up_on_the_sum_with_the_skip():
    x, skip, emb = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6), torch.randn(2, 8)
    down, up = awake(Down(3, 6, 2, 3, 8)), awake(Up(6, 4, 2, 2, 8))
    coarse = down.patch_conv(x)
    for i in range(3):
        coarse = down.blocks[i](coarse, emb)
    torch.testing.assert_close(down(x, emb), coarse)
    fine = up.patch_expand(coarse, (5, 6)) + skip
    for i in range(2):
        fine = up.blocks[i](fine, emb)
    torch.testing.assert_close(up(coarse, skip, emb), fine)


@pytest.mark.parametrize("patch", [1, 2, 3, 4])
@pytest.mark.parametrize("height, width", SIZES)
def test_up_returns_to_the_grid_that_down_left(height, width, patch):
    emb, x = torch.randn(2, 8), torch.randn(2, 3, height, width)
    skip = awake(Down(3, 4, 1, 1, 8))(x, emb)
    coarse = awake(Down(4, 6, patch, 2, 8))(skip, emb)
    assert coarse.shape == (2, 6, -(-height // patch), -(-width // patch))
    assert awake(Up(6, 4, patch, 2, 8))(coarse, skip, emb).shape == skip.shape


# Attention

def quadratic_attention(attention, head_dim, x):
    """(x + the mixed values, the N x N weights) in float64, the matrix of weights written out."""
    attention, x = copy.deepcopy(attention).double(), x.double()
    b, c, h, w = x.shape
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = attention.qkv(tokens).chunk(3, dim=-1)
    heads, weights = [], []
    for q, k, v in zip(*(part.split(head_dim, dim=-1) for part in (q, k, v))):
        weights.append(q.softmax(-1) @ k.softmax(1).transpose(1, 2))
        heads.append(weights[-1] @ v)
    mixed = attention.out(torch.cat(heads, dim=-1))
    return x + mixed.transpose(1, 2).view(b, c, h, w), torch.stack(weights)


@pytest.mark.parametrize("channels, head_dim", [(8, 8), (12, 4), (6, 1)])
@pytest.mark.parametrize("height, width", SIZES)
def test_attention_is_the_quadratic_form_with_weights_that_sum_to_one(
        height, width, channels, head_dim):
    attention, x = awake(SelfAttention(channels, head_dim)), torch.randn(2, channels, height, width)
    expected, weights = quadratic_attention(attention, head_dim, x)
    torch.testing.assert_close(attention(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_attention_of_equal_values_returns_them():
    attention, x = awake(SelfAttention(8, 4)), torch.randn(2, 8, 5, 7)
    value, bias = torch.zeros(8), torch.randn(8)
    with torch.no_grad():  # whatever the tokens, every value vector is `bias`
        attention.qkv.weight[16:], attention.qkv.bias[16:] = value[:, None], bias
    added = attention.out(bias).view(1, 8, 1, 1).expand_as(x)
    torch.testing.assert_close(attention(x) - x, added)


def test_attention_costs_as_much_a_pixel_on_every_grid():
    attention = SelfAttention(32, 8)
    assert operations(attention, torch.zeros(1, 32, 32, 32)) == 16 * operations(
        attention, torch.zeros(1, 32, 8, 8))


# The model

@pytest.mark.parametrize("patch", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [16, 17, 28, 33, 64])
def test_every_weight_gets_a_gradient_at_every_image_and_patch_size(
        tiny, monkeypatch, size, patch):
    monkeypatch.setattr(tiny, "IMG_SIZE", size)
    monkeypatch.setattr(tiny, "PATCH_SIZE", patch)
    model = FashionMNISTUNetDenoiser()
    t, labels = torch.tensor([0, 19]), torch.tensor([3, tiny.NUM_CLASSES])
    x_start, noise = torch.rand(2, 2, 1, size, size)
    assert model(x_start, t, labels).shape == x_start.shape
    diffusion_loss(awake(model).train(), x_start, t, labels, noise).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("channels, blocks", [
    ((16,), (2,)), ((8, 16), (0, 0)), ((4, 8, 16), (1, 0, 2)), ((4, 4, 8, 16), (1, 1, 1, 1))])
@pytest.mark.parametrize("size", [16, 33])
def test_every_depth_runs(tiny, size, channels, blocks):
    model = awake(FashionMNISTUNetDenoiser(
        {"IMG_SIZE": size, "CHANNELS": channels, "BLOCKS": blocks}))
    sides = []
    for down in model.downs:
        down.register_forward_hook(lambda _down, args, y: sides.append(
            (args[0].shape[-1], y.shape[-1])))
    assert sample(model, [0, 1], steps=2).shape == (2, 1, size, size)
    for (before, after), patch in zip(sides[:len(channels)], (4, 2, 2, 2)):
        assert after == -(-before // patch)


def test_each_resolution_has_its_own_number_of_blocks_on_the_way_down_and_up(tiny):
    model = FashionMNISTUNetDenoiser({"CHANNELS": (4, 8, 16), "BLOCKS": (1, 2, 3)})
    down, up = ([len(part.blocks) for part in way] for way in (model.downs, model.ups))
    assert (down, len(model.middle), up) == ([1, 2, 3], 3, [2, 1])


def test_model_in_training_whose_last_grid_is_one_cell_is_measured_and_left_in_training(tiny):
    model = FashionMNISTUNetDenoiser(   # 4 x 4 cells, 2 x 2, 1 x 1: of one image no statistics
        {"IMG_SIZE": 16, "CHANNELS": (4, 8, 16), "BLOCKS": (1, 1, 1)})
    label = torch.zeros(1, dtype=torch.long)
    assert model_size(model)[1] == operations(
        copy.deepcopy(model), torch.zeros(1, 1, 16, 16), label, label)
    assert model.training


def test_constants_of_the_call_override_those_of_the_module(tiny):
    model = FashionMNISTUNetDenoiser({"NUM_DIFFUSION_STEPS": 7, "CHANNELS": (16, 16)})
    assert len(model.abar) == 7 and model.constants["CHANNELS"] == (16, 16)
    assert {name: model.constants[name] for name in ("IMG_SIZE", "EMBEDDING_DIM")} == {
        name: TINY[name] for name in ("IMG_SIZE", "EMBEDDING_DIM")}


def test_loaded_model_has_the_noise_schedule_of_its_checkpoint(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        for name, value in (("BETA_SCHEDULE", "linear"), ("BETA_START", 2e-4), ("BETA_END", 0.03),
                            ("NUM_DIFFUSION_STEPS", 100)):
            patch.setattr(tiny, name, value)
        Trainer(torch.device("cpu")).save("last")
    expected = np.cumprod(1 - np.linspace(2e-4, 0.03, 100) * 10)
    np.testing.assert_allclose(load_denoiser(checkpoint("last")).abar.cpu(), expected, rtol=1e-4)


def test_untrained_model_predicts_v_zero(tiny):
    v = FashionMNISTUNetDenoiser()(torch.randn(4, 1, 28, 28), torch.arange(4), torch.arange(4))
    assert v.shape == (4, 1, 28, 28) and not v.any()


def test_classes_start_near_each_other():
    classes = FashionMNISTUNetDenoiser().class_embedding.weight     # torch's 1 trained much worse
    assert classes.std().item() == pytest.approx(0.5, rel=0.1)


def test_prediction_depends_on_time_and_on_each_class_and_the_null_class(tiny):
    model, classes = awake(FashionMNISTUNetDenoiser()), torch.arange(tiny.NUM_CLASSES + 1)
    x_t = torch.randn(1, 1, 28, 28).expand(len(classes), -1, -1, -1)
    by_class = model(x_t, torch.zeros_like(classes), classes).flatten(1)
    by_time = model(x_t, classes, torch.zeros_like(classes)).flatten(1)
    for v in (by_class, by_time):
        assert nn.functional.pdist(v).min() > 1e-2


def test_time_is_embedded_as_cosines_and_sines_of_a_thousandfold_range():
    time = np.linspace(0, 1, 7)
    angles = np.outer(time, np.geomspace(1, 1000, 32))
    torch.testing.assert_close(
        time_embedding(torch.tensor(time, dtype=torch.float32)).double(),
        torch.tensor(np.concatenate([np.cos(angles), np.sin(angles)], axis=1)), rtol=0, atol=2e-4)


def test_time_is_a_share_of_the_steps(tiny):
    fine = awake(FashionMNISTUNetDenoiser({"NUM_DIFFUSION_STEPS": 100}))
    coarse = FashionMNISTUNetDenoiser({"NUM_DIFFUSION_STEPS": 20}).eval()
    coarse.load_state_dict(fine.state_dict())
    x_t, t, labels = torch.randn(5, 1, 28, 28), torch.arange(0, 20, 4), torch.arange(5)
    torch.testing.assert_close(coarse(x_t, t, labels), fine(x_t, 5 * t, labels))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_of_the_model_is_that_of_each_residual_block(tiny, dropout):
    modules = list(FashionMNISTUNetDenoiser(dropout=dropout).modules())
    blocks = sum(isinstance(module, ResBlock) for module in modules)
    shares = [module.p for module in modules if isinstance(module, nn.Dropout)]
    assert shares == [dropout] * blocks and blocks == 4     # down, down, middle, up


def test_model_is_the_u_net_of_its_parts(tiny):
    model = awake(FashionMNISTUNetDenoiser({"CHANNELS": (16, 32, 48), "BLOCKS": (1, 1, 1)}))
    x_t, t, labels = torch.randn(3, 1, 28, 28), torch.tensor([0, 7, 19]), torch.tensor([3, 9, 10])
    act = nn.functional.hardswish
    first, last = model.time_mlp[0], model.time_mlp[2]
    emb = act(last(act(first(time_embedding(t / 20)))) + model.class_embedding(labels))
    fine = model.downs[0](x_t, emb)
    medium = model.downs[1](fine, emb)
    coarse = model.middle(model.attention(model.downs[2](medium, emb)), emb)
    x = model.ups[1](model.ups[0](coarse, medium, emb), fine, emb)
    torch.testing.assert_close(model(x_t, t, labels), model.to_pixels(act(model.norm(x)), (28, 28)))


def test_default_model_uses_every_block():
    model, used = FashionMNISTUNetDenoiser().eval(), set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: used.add(type(module)))
    model(torch.zeros(1, 1, 28, 28), *torch.zeros(2, 1, dtype=torch.long))
    assert used >= {PatchConv, PatchExpand, DoubleConv, ResBlock, Down, Up, SelfAttention}


def test_convolutions_of_a_trainers_and_of_a_loaded_model_work_in_channels_last(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(torch.device("cpu"))
    trainer.save("last")
    loaded, seen = load_denoiser(checkpoint("last"), "cpu"), []

    def look(conv, inputs):
        seen.append(all(part.is_contiguous(memory_format=torch.channels_last)
                        for part in (*inputs, conv.weight)))

    models = trainer.model, trainer.average, loaded, loaded.guide[0]
    for model in models:
        convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)
                        and part.kernel_size == (3, 3)]
        for conv in convolutions:
            conv.register_forward_pre_hook(look)
        model.eval()(torch.zeros(2, 1, 28, 28), *torch.zeros(2, 2, dtype=torch.long))
    assert len(convolutions) == 7 and seen == [True] * 7 * len(models)


def test_the_way_up_ends_its_blocks_with_one_by_one():
    model = FashionMNISTUNetDenoiser()
    kernels = [[block.double_conv.second[-1].kernel_size for block in blocks]
               for blocks in (*(up.blocks for up in model.ups), model.middle)]
    assert kernels == [[(1, 1)], [(1, 1)], [(3, 3)]]


def test_default_model_fits_its_budget():
    model = FashionMNISTUNetDenoiser()
    label = torch.zeros(1, dtype=torch.long)
    parameters, flops = model_size(model)
    assert parameters == sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert flops == operations(model, torch.zeros(1, 1, 28, 28), label, label) <= 120_000_000
    for said in (f"{parameters / 1e6:.2f} M parameters and {flops / 1e6:.1f} MFLOP per image",
                 f"{parameters:,} parameters, {flops / 1e6:.1f} MFLOP per image"):
        assert said in (ROOT / "README.md").read_text()


def test_readmes_drawing_shows_the_sizes_of_the_default_models_maps():
    model, shapes = FashionMNISTUNetDenoiser(), {}
    for part in (*model.downs, *model.ups, model.middle):
        part.register_forward_hook(lambda part, _x, y: shapes.update({part: tuple(y.shape[1:])}))
    x_t, label = torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)
    v = model.eval()(x_t, label, label)
    left = [tuple(x_t.shape[1:]), *(shapes[down] for down in model.downs)]
    right = [tuple(v.shape[1:]), *(shapes[up] for up in reversed(model.ups)), shapes[model.middle]]
    drawing = re.search("```\n(x_t: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    drawn = [tuple(map(int, size)) for size in re.findall(r"(\d+) x (\d+) x (\d+)", drawing)]
    assert drawn == [size for pair in zip(left, right) for size in pair]


def test_format_is_another_one_when_the_weights_are():
    """A checkpoint's weights have these names and shapes. When they change, raise FORMAT, so that
    older checkpoints are refused by name, and put both new values here."""
    shapes = [(name, *value.shape) for name, value in
              FashionMNISTUNetDenoiser().state_dict().items()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    assert (script_unet.FORMAT, digest) == (5, "7a9002e4")


def test_averaged_model_predicts_in_eval_mode_as_well_as_with_a_big_batchs_statistics(
        tiny, pictures, monkeypatch):
    monkeypatch.setattr(tiny, "EPOCHS", 100)
    monkeypatch.setattr(tiny, "usual_epoch", lambda: 100)   # else the guide would measure them
    images, labels = pictures
    trainer = Trainer(torch.device("cpu"))
    for step in range(30):
        trainer.progress["position"] = step % 6 * tiny.BATCH_SIZE
        trainer.step(images, labels)
    draw = torch.Generator().manual_seed(1)
    t = torch.randint(tiny.NUM_DIFFUSION_STEPS, (600,), generator=draw)
    noise = torch.randn(600, 1, 28, 28, generator=draw)

    def loss(model):
        with torch.no_grad():
            return diffusion_loss(model, to_float(images), t, labels, noise).mean().item()

    stale = loss(trainer.average.eval())
    refresh_batch_norm(trainer.average, images, labels)
    assert not trainer.average.training
    fresh, batch = loss(trainer.average), copy.deepcopy(trainer.average).train()
    for module in batch.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert fresh == pytest.approx(loss(batch), rel=0.01)
    assert stale > 1.05 * fresh     # else this test could not fail
