"""The PyTorch reference: the published sizes, the paper's equations by hand, and one result by every way of asking for it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import new_tiny, picture
from PIL import Image
from torch import Tensor, nn

from agvas import AGVAS
from agvas.config import ANSWER, AGVASConfig, MaskDecoderConfig, ov_7b, tiny
from agvas.mask_decoder import Maps, MaskDecoder
from agvas.spam import SPAM
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from runtime import preprocess
from runtime.prompts import Prompts


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def paper_model() -> AGVAS:
    """Of the paper's sizes, without weights."""
    with torch.device("meta"):
        return AGVAS(ov_7b(), train_tokenizer([ANSWER], 512))


@pytest.fixture(scope="module")
def random_tiny() -> AGVAS:
    return new_tiny()


def with_config(model: AGVAS, config: AGVASConfig) -> AGVAS:
    """The same weights under another configuration."""
    other = AGVAS(config, model.tokenizer)
    other.load_state_dict(model.state_dict())
    return other.eval()


def with_prompts(model: AGVAS, prompts: Prompts) -> AGVAS:
    return with_config(model, dataclasses.replace(model.config, prompts=prompts))


def inputs(model: AGVAS, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    settings = model.config.preprocessing
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 3, settings.pixel_size, settings.pixel_size, generator=generator),
        torch.randn(batch, 3, settings.semantic_size, settings.semantic_size, generator=generator),
    )


# --- the published sizes ---


def test_the_pixel_encoder_has_the_parameters_of_sam_vit_h(paper_model: AGVAS) -> None:
    """The image encoder of sam_vit_h_4b8939."""
    assert parameters(paper_model.pixel_encoder) == 637_026_048
    assert paper_model.config.pixel.grid == 64


def test_the_language_model_has_the_parameters_of_qwen2_7b(paper_model: AGVAS) -> None:
    assert parameters(paper_model.language) == 7_615_616_512
    assert tuple(paper_model.language.lm_head.weight.shape) == (152_064, 3584)


def test_the_semantic_tower_is_so400m_without_last_layer_norm_and_head(paper_model: AGVAS) -> None:
    width, mlp, patch, positions, layers = 1152, 4304, 14, 729, 27
    attention = 4 * (width * width + width)
    feed_forward = (width * mlp + mlp) + (mlp * width + width)
    layer = attention + feed_forward + 2 * 2 * width
    embeddings = (3 * patch * patch * width + width) + positions * width
    head = width + attention + 2 * width + feed_forward  # probe, attention pooling, norm, MLP
    assert embeddings + layers * layer + 2 * width + head == 428_225_600  # google/siglip-so400m-patch14-384's vision tower
    encoder = paper_model.semantic_encoder
    assert parameters(encoder.embeddings) + parameters(encoder.encoder) == embeddings + (layers - 1) * layer
    assert parameters(encoder.projector) == (1152 * 3584 + 3584) + (3584 * 3584 + 3584)


def test_an_image_is_729_tokens(paper_model: AGVAS) -> None:
    assert paper_model.config.semantic.tokens == 729
    assert paper_model.semantic_encoder.embeddings.num_positions == 729


def test_the_mask_decoder_has_sams_two_way_transformer(paper_model: AGVAS) -> None:
    """Two blocks of self-attention at 256 and cross-attention at 128, MLP 2048, four norms; one final attention and norm."""
    full, half = 4 * (256 * 256 + 256), 3 * (256 * 128 + 128) + 128 * 256 + 256
    block = full + 2 * half + (256 * 2048 + 2048 + 2048 * 256 + 256) + 4 * 512
    assert parameters(paper_model.mask_decoder.transformer) == 2 * block + half + 512
    assert parameters(paper_model.mask_decoder.refiner) == (3584 * 3584 + 3584) + (3584 * 256 + 256)
    assert tuple(paper_model.mask_decoder.queries.shape) == (3, 256)


def test_the_pieces_fit_together_at_the_papers_size(paper_model: AGVAS) -> None:
    """On the meta device: shapes alone."""
    with torch.device("meta"):
        features = torch.empty(2, 729, 1152)
        pixels = torch.empty(2, 256, 64, 64)
        assert paper_model.spam(features, pixels).shape == (2, 729, 3584)
        assert paper_model.semantic_encoder.projector(features).shape == (2, 729, 3584)
        assert paper_model.mask_decoder(torch.empty(2, 3, 3584), pixels).anomaly_map.shape == (2, 256, 256)


# --- the encoders are the published ones ---


def test_the_pixel_encoder_is_transformers_sam(random_tiny: AGVAS) -> None:
    from transformers import SamVisionConfig, SamVisionModel

    config = random_tiny.config.pixel
    theirs = SamVisionModel(
        SamVisionConfig(
            hidden_size=config.width,
            output_channels=config.output_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            window_size=config.window,
            global_attn_indexes=list(config.global_layers),
            mlp_dim=config.mlp_width,
            attn_implementation="eager",
        )
    ).eval()
    theirs.vision_encoder.load_state_dict(random_tiny.pixel_encoder.state_dict())
    pixel_image, _ = inputs(random_tiny, batch=2)
    with torch.no_grad():
        expected = theirs(pixel_image).last_hidden_state
        got = random_tiny.pixel_encoder(pixel_image).last_hidden_state
    assert got.shape == (2, 32, 7, 7)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # SDPA against eager


def test_semantic_features_are_siglips_last_hidden_states_before_its_final_norm(random_tiny: AGVAS) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = random_tiny.config.semantic
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            attn_implementation="eager",
        )
    ).eval()
    ours = {name: value for name, value in random_tiny.semantic_encoder.state_dict().items() if "projector" not in name}
    left_out = theirs.load_state_dict(ours, strict=False)
    assert not left_out.unexpected_keys
    assert all(name.startswith(("post_layernorm", "head")) for name in left_out.missing_keys)
    _, semantic_image = inputs(random_tiny, batch=2)
    with torch.no_grad():
        output = theirs(semantic_image, output_hidden_states=True)
        features, embeddings = random_tiny.semantic_encoder(semantic_image)
    assert features.shape == (2, 9, 14)
    torch.testing.assert_close(features, output.hidden_states[-1], atol=1e-5, rtol=1e-5)
    assert (features - output.last_hidden_state).abs().max() > 1e-2
    # The projector: two linear layers and an exact GELU between.
    projector = random_tiny.semantic_encoder.projector
    first, second = projector.linear_1, projector.linear_2
    hidden = features.double() @ first.weight.double().T + first.bias.double()
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = hidden @ second.weight.double().T + second.bias.double()
    torch.testing.assert_close(embeddings.double(), expected, atol=1e-5, rtol=1e-5)


def test_every_patch_of_both_encoders_knows_its_place(random_tiny: AGVAS) -> None:
    """The same grey everywhere still gives other features in each cell."""
    pixel_image, semantic_image = (torch.full_like(image, 0.3) for image in inputs(random_tiny))
    with torch.no_grad():
        pixels = random_tiny.pixel_encoder(pixel_image).last_hidden_state[0].flatten(1).T
        tokens = random_tiny.semantic_encoder(semantic_image)[0][0]
    for cells in (pixels, tokens):
        distances = torch.cdist(cells, cells) + torch.eye(len(cells))
        assert distances.min() > 1e-4


# --- SPAM, eq. 1-2 ---


def test_spam_is_multi_head_cross_attention_written_out() -> None:
    torch.manual_seed(0)
    spam = SPAM(semantic_width=5, pixel_width=7, width=6, heads=3, output_width=11)
    features, pixels = torch.randn(2, 4, 5), torch.randn(2, 7, 2, 3)
    with torch.no_grad():
        got = spam(features, pixels)
    assert got.shape == (2, 4, 11)

    def linear(layer: nn.Module, vector: np.ndarray) -> np.ndarray:
        weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        return np.array([sum(weight[o, i] * vector[i] for i in range(len(vector))) + bias[o] for o in range(len(weight))])

    for b in range(2):
        keys, values = [], []
        for row in range(2):
            for column in range(3):
                cell = linear(spam.pixel_map, pixels[b, :, row, column].double().numpy())
                keys.append(linear(spam.key, cell))
                values.append(linear(spam.value, cell))
        for token in range(4):
            query = linear(spam.query, linear(spam.semantic_map, features[b, token].double().numpy()))
            joined = np.zeros(6)
            for head in range(3):
                part = slice(2 * head, 2 * head + 2)
                scores = np.array([query[part] @ key[part] / math.sqrt(2) for key in keys])
                weights = np.exp(scores) / np.exp(scores).sum()
                joined[part] = sum(weight * value[part] for weight, value in zip(weights, values))
            np.testing.assert_allclose(got[b, token], linear(spam.output, joined), atol=1e-6)


# --- the mask decoder, eq. 4-8 ---


@pytest.fixture
def decoder() -> MaskDecoder:
    torch.manual_seed(1)
    return MaskDecoder(MaskDecoderConfig(layers=2, heads=2, mlp_width=31), language_width=24, width=32, grid=5).eval()


def random_decoder_inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, 24, generator=generator), torch.randn(batch, 32, 5, 5, generator=generator)


@torch.no_grad()
def test_maps_have_four_cells_to_a_cell_and_each_image_is_its_own(decoder: MaskDecoder) -> None:
    states, pixels = random_decoder_inputs()
    both = decoder(states, pixels)
    assert [tuple(part.shape) for part in both] == [(2, 20, 20), (2, 2, 20, 20), (2, 20, 20), (2, 2, 20, 20), (2, 20, 20)]
    for b in range(2):
        alone = decoder(states[b : b + 1], pixels[b : b + 1])
        for part, whole in zip(alone, both):
            torch.testing.assert_close(part[0], whole[b], atol=1e-5, rtol=1e-5)
    assert (both.anomaly_map[0] - both.anomaly_map[1]).abs().max() > 1e-3


@pytest.mark.parametrize("share", [0.5, 0.3])
@torch.no_grad()
def test_the_fused_map_is_the_papers_by_hand(share: float) -> None:
    torch.manual_seed(1)
    config = MaskDecoderConfig(layers=2, heads=2, mlp_width=31, fusion_weight=share)
    maps = MaskDecoder(config, language_width=24, width=32, grid=5).eval()(*random_decoder_inputs())
    for b in range(2):
        for row in range(0, 20, 3):
            for column in range(20):
                absolute = 1 / (1 + math.exp(-float(maps.logit_absolute[b, row, column])))  # eq. 6
                normal, anomalous = (math.exp(float(logit)) for logit in maps.logit_relative[b, :, row, column])
                relative = anomalous / (normal + anomalous)  # eq. 7
                cell = (b, row, column)
                assert float(maps.probability_absolute[cell]) == pytest.approx(absolute, abs=1e-6)
                assert float(maps.probability_relative[b, 1, row, column]) == pytest.approx(relative, abs=1e-6)
                assert float(maps.probability_relative[b, 0, row, column]) == pytest.approx(1 - relative, abs=1e-6)
                assert float(maps.anomaly_map[cell]) == pytest.approx(share * absolute + (1 - share) * relative, abs=1e-6)


class Unmixed(nn.Module):
    """Stands in for the two-way transformer: gives back what it was given, and keeps it."""

    def forward(
        self, point_embeddings: Tensor, image_embeddings: Tensor, image_positional_embeddings: Tensor, attention_similarity: None
    ) -> tuple[Tensor, Tensor]:
        self.tokens, self.pixels, self.positions = point_embeddings, image_embeddings, image_positional_embeddings
        return point_embeddings, image_embeddings.flatten(2).transpose(1, 2).unsqueeze(1)


@torch.no_grad()
def test_tokens_are_refined_anchors_then_queries_and_the_queries_make_the_kernels(decoder: MaskDecoder) -> None:
    decoder.transformer = unmixed = Unmixed()
    states, pixels = random_decoder_inputs()
    maps = decoder(states, pixels)
    for b in range(2):
        for anchor in range(3):
            torch.testing.assert_close(unmixed.tokens[b, 0, anchor], decoder.refiner(states[b, anchor]))
            torch.testing.assert_close(unmixed.tokens[b, 0, 3 + anchor], decoder.queries[anchor])
    torch.testing.assert_close(unmixed.pixels, pixels)
    torch.testing.assert_close(unmixed.positions, decoder.positions())
    logits = (maps.logit_relative[:, 0], maps.logit_relative[:, 1], maps.logit_absolute)  # normal, anomalous, segment
    for b in range(2):
        for row in range(5):
            for column in range(5):
                features = decoder.upscaling(pixels[b, :, row, column].reshape(1, 32, 1, 1))[0]  # [P / 8, 4, 4]
                for anchor, logit in enumerate(logits):
                    kernel = decoder.hypernetworks[anchor](decoder.queries[anchor].unsqueeze(0))[0]
                    expected = sum(kernel[channel] * features[channel] for channel in range(4))
                    block = logit[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                    torch.testing.assert_close(block, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cell_of_the_embeddings_owns_its_block_of_the_map(decoder: MaskDecoder) -> None:
    """With the real transformer, its cross-attention silenced so that nothing else may carry a change over."""
    for block in decoder.transformer.layers:
        for attention in (block.cross_attn_image_to_token, block.cross_attn_token_to_image):
            nn.init.zeros_(attention.out_proj.weight)
    nn.init.zeros_(decoder.transformer.final_attn_token_to_image.out_proj.weight)
    states, pixels = random_decoder_inputs(1)
    changed = pixels.clone()
    changed[0, :, 1, 3] += torch.randn(32, generator=torch.Generator().manual_seed(4))
    difference = (decoder(states, changed).anomaly_map - decoder(states, pixels).anomaly_map).abs()[0]
    assert (difference[4:8, 12:16] > 1e-7).float().mean() > 0.8
    difference[4:8, 12:16] = 0
    assert difference.max() < 1e-7


@torch.no_grad()
def test_the_anchors_reach_the_map(decoder: MaskDecoder) -> None:
    states, pixels = random_decoder_inputs(1)
    before = decoder(states, pixels)
    for anchor in range(3):
        moved = states.clone()
        moved[0, anchor] += 3
        assert (decoder(moved, pixels).anomaly_map - before.anomaly_map).abs().max() > 1e-5


@torch.no_grad()
def test_positions_are_as_exact_in_training_as_they_are_in_use(decoder: MaskDecoder) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        trained = decoder.positions()
    assert torch.equal(trained, decoder.positions())


@torch.no_grad()
def test_positions_are_sams_fourier_features_of_the_cells_centres(decoder: MaskDecoder) -> None:
    got = decoder.positions()
    assert got.shape == (1, 32, 5, 5)
    frequencies = decoder.frequencies.double().numpy()
    for row in range(5):
        for column in range(5):
            x, y = 2 * (column + 0.5) / 5 - 1, 2 * (row + 0.5) / 5 - 1
            angles = 2 * math.pi * (x * frequencies[0] + y * frequencies[1])
            expected = np.concatenate([np.sin(angles), np.cos(angles)])
            np.testing.assert_allclose(got[0, :, row, column], expected, atol=1e-5)


@torch.no_grad()
def test_positions_agree_with_transformers_sam(decoder: MaskDecoder) -> None:
    from transformers import SamConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    small = SamVisionConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, image_size=40, patch_size=8, mlp_dim=4,
                            output_channels=32, num_pos_feats=16, global_attn_indexes=[0])  # fmt: skip
    prompts = SamPromptEncoderConfig(hidden_size=32, image_size=40, patch_size=8)
    theirs = SamModel(SamConfig(vision_config=small, prompt_encoder_config=prompts, mask_decoder_config={"hidden_size": 32,
                                "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 4}))  # fmt: skip
    theirs.shared_image_embedding.positional_embedding.data = decoder.frequencies.clone()
    torch.testing.assert_close(decoder.positions(), theirs.get_image_wide_positional_embeddings(), atol=1e-5, rtol=1e-5)


def test_a_map_can_be_fused_without_the_decoder_that_made_its_logits(decoder: MaskDecoder) -> None:
    maps = decoder.fuse(torch.tensor([math.log(1.0), math.log(3.0), 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2))
    assert isinstance(maps, Maps)
    torch.testing.assert_close(maps.anomaly_map, torch.full((1, 2, 2), 0.5 * 0.5 + 0.5 * 0.75))


# --- the whole ---

ANCHORS = "[NOR][ANO][SEG]"


@torch.no_grad()
def test_the_language_model_reads_prefix_image_aligned_suffix_answer(random_tiny: AGVAS) -> None:
    vision = random_tiny.see(*inputs(random_tiny, batch=2))
    prompt = random_tiny.prompt_encoder.encode()
    other = dataclasses.replace(prompt, suffix=prompt.suffix[:-4])
    answers = ((5, 300, 7), (9,))
    got = random_tiny.input_embeddings(vision, [prompt, other], answers)
    table = random_tiny.language.get_input_embeddings().weight
    for b in range(2):
        expected = [table[i] for i in prompt.prefix]
        expected += list(vision.image_embeddings[b]) + list(vision.aligned_embeddings[b])
        expected += [table[i] for i in (*(prompt, other)[b].suffix, *answers[b])]
        torch.testing.assert_close(got[b, : len(expected)], torch.stack(expected))
    end = table[random_tiny.prompt_encoder.end_id]
    torch.testing.assert_close(got[1, -6:], end.expand(6, -1))  # four of the suffix and two of the answer less


@pytest.mark.parametrize("anchor_position", ["own", "predicting"])
def test_a_given_answer_and_a_generated_one_have_the_same_states(tiny_model: AGVAS, anchor_position: str) -> None:
    model = with_prompts(tiny_model, dataclasses.replace(tiny_model.config.prompts, anchor_position=anchor_position))
    image = picture(4)
    segmented = model.segment(image)
    assert segmented.anchor_states is not None
    settings = model.config.preprocessing
    pixel_image, frame = preprocess.pixel_image(Image.fromarray(image), settings)
    prompt = model.prompt_encoder.encode()
    with torch.no_grad():
        output = model(
            torch.from_numpy(pixel_image)[None],
            torch.from_numpy(preprocess.semantic_image(Image.fromarray(image), settings))[None],
            [prompt],
            [segmented.answer_ids],
        )
    # One pass sums in another order than a pass per token over a cache does.
    np.testing.assert_allclose(output.anchor_states[0], segmented.anchor_states, atol=1e-4)
    assert tuple(output.logits[0].argmax(-1).tolist()) == segmented.answer_ids == prompt.draft
    restored = preprocess.restore(output.maps.anomaly_map[0].numpy(), frame)
    np.testing.assert_allclose(restored, segmented.anomaly_map, atol=2e-5)


@torch.no_grad()
def test_an_anchors_state_is_its_own_or_the_one_that_predicts_it(random_tiny: AGVAS) -> None:
    """Against the states of a bare pass over the same embeddings."""
    vision_inputs = inputs(random_tiny)
    prompt = random_tiny.prompt_encoder.encode()
    assert prompt.draft is not None
    embeddings = random_tiny.input_embeddings(random_tiny.see(*vision_inputs), [prompt], [prompt.draft])
    states = random_tiny.language.model(inputs_embeds=embeddings).last_hidden_state[0]
    places = [embeddings.shape[1] - len(prompt.draft) + prompt.draft.index(i) for i in random_tiny.prompt_encoder.anchor_ids]
    for anchor_position, shift in (("own", 0), ("predicting", -1)):
        prompts = dataclasses.replace(random_tiny.config.prompts, anchor_position=anchor_position)
        got = with_prompts(random_tiny, prompts)(*vision_inputs, [prompt], [prompt.draft]).anchor_states[0]
        expected = torch.stack([states[place + shift] for place in places])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_is_its_images_one_by_one_whatever_is_asked_and_answered(random_tiny: AGVAS) -> None:
    """Questions and answers of different lengths, one answer without anchors: padding changes nothing that counts."""
    pixel_images, semantic_images = inputs(random_tiny, batch=3)
    encoder = random_tiny.prompt_encoder
    prompts = [encoder.encode("Segment."), encoder.encode("Please describe the picture in your own words."), encoder.encode()]
    answers = [encoder.encode_answer(text) for text in (f"There is a large hole. {ANCHORS}", "A cat.", ANSWER)]
    together = random_tiny(pixel_images, semantic_images, prompts, answers)
    assert together.logits.shape == (3, max(map(len, answers)), 512)
    assert together.anchor_states.shape == (3, 3, 24)
    for b, (prompt, answer) in enumerate(zip(prompts, answers)):
        alone = random_tiny(pixel_images[b : b + 1], semantic_images[b : b + 1], [prompt], [answer])
        torch.testing.assert_close(together.logits[b, : len(answer)], alone.logits[0], atol=1e-5, rtol=1e-5)
        if encoder.find_anchors(answer) is not None:
            torch.testing.assert_close(together.anchor_states[b], alone.anchor_states[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together.maps.anomaly_map[b], alone.maps.anomaly_map[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_that_were_kept_stand_for_the_images(random_tiny: AGVAS) -> None:
    prompt = random_tiny.prompt_encoder.encode()
    assert prompt.draft is not None
    images = inputs(random_tiny)
    seen = random_tiny(*images, [prompt], [prompt.draft])
    kept = random_tiny(*(torch.full_like(image, torch.nan) for image in images), [prompt], [prompt.draft], random_tiny.encode(*images))
    torch.testing.assert_close(kept.maps.anomaly_map, seen.maps.anomaly_map, atol=0, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(41, 67), (67, 41), (1, 1)])
def test_mask_and_score_follow_from_the_map(tiny_model: AGVAS, height: int, width: int) -> None:
    image = picture(1, height, width)
    first = tiny_model.segment(image)
    middle = float(np.median(first.anomaly_map))
    decoder = dataclasses.replace(tiny_model.config.mask_decoder, threshold=middle)
    model = with_config(tiny_model, dataclasses.replace(tiny_model.config, mask_decoder=decoder))
    for threshold, result in ((0.5, first), (middle, model.segment(image))):
        assert result.anomaly_map.shape == result.mask.shape == (height, width)
        assert (result.anomaly_map.dtype, result.mask.dtype) == (np.float32, np.bool_)
        assert 0 <= result.anomaly_map.min() <= result.anomaly_map.max() <= 1
        np.testing.assert_array_equal(result.mask, result.anomaly_map > threshold)
        assert result.score == result.anomaly_map.max()
        assert (result.score > threshold) == result.mask.any()
        assert result.text == tiny_model.config.prompts.answer
        assert result.answer_ids[-1] == tiny_model.prompt_encoder.end_id
        assert result.anchor_states is not None and result.anchor_states.shape == (3, 24)


def test_the_same_image_gives_the_same_result_and_another_gives_another(tiny_model: AGVAS) -> None:
    first, again, other = (tiny_model.segment(picture(seed)) for seed in (7, 7, 8))
    # The last bit may depend on where NumPy's memory lies; a dropout left on would be far beyond it.
    np.testing.assert_allclose(first.anomaly_map, again.anomaly_map, atol=1e-6)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert first.answer_ids == again.answer_ids
    assert np.abs(first.anomaly_map - other.anomaly_map).max() > 1e-4


def test_a_random_model_without_anchors_gives_an_empty_mask_and_no_score() -> None:
    result = new_tiny(seed=11).segment(picture())
    assert result.anchor_states is None
    assert (result.score, result.mask.any(), result.anomaly_map.any()) == (0.0, False, False)
    assert result.mask.shape == picture().shape[:2]


def test_tinys_axes_are_told_apart() -> None:
    config = tiny()
    axes = [config.pixel.width, config.pixel.output_width, config.pixel.grid, config.pixel.mlp_width]
    axes += [config.semantic.width, config.semantic.tokens, config.spam.width]
    axes += [config.language.width, config.language.mlp_width, config.mask_decoder.mlp_width]
    assert len(set(axes)) == len(axes)
    assert len(train_tokenizer([*all_instructions(), ANSWER], 512).get_vocab()) <= config.language.vocabulary
