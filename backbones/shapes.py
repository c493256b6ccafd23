"""Shapes of models with new random weights; a Qwen2-VL where no other backbone stands."""

from transformers import AutoConfig

SPECIAL_IDS = ("image_pad", "video_pad", "vision_start", "vision_end")  # tokens that a configuration names


def rope(theta, *sections):
    return dict(rope_type="default", rope_theta=theta, mrope_section=list(sections))


TINY_TEXT = dict(
    hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=128**-0.5, max_position_embeddings=8192)
TINY_LIMITS = dict(
    min_pixels=28 * 28, max_pixels=28 * 28 * 36, video_min_pixels=28 * 28, video_max_pixels=28 * 28 * 9,
    max_len=512, num_frames=16)
# limits: in the pixels of a Qwen2-VL, see `limits_of`
SHAPES = {
    # 1.5 million parameters, plus 128 for each token; a laptop trains it.
    # Qwen2-VL's own 0.02 as the standard deviation of new weights is made for a width of 1536: here pictures
    # would not be read at all (docs/log.md).  With a rope_theta of 10000 and heads of 32, columns of a
    # picture would be all but indistinguishable.
    "tiny": dict(
        text=dict(TINY_TEXT, rope_parameters=rope(100.0, 4, 6, 6)),
        vision=dict(
            depth=1, embed_dim=128, hidden_size=128, num_heads=4, mlp_ratio=2, initializer_range=128**-0.5),
        prompt="Think, then embed.", limits=TINY_LIMITS),
    # The same as a Qwen3-VL: pictures of 32 pixels a token, features that enter behind the first layer, too.
    "tiny3": dict(
        backbone="qwen3_vl",
        text=dict(TINY_TEXT, head_dim=32, rope_parameters=rope(100.0, 6, 5, 5)),
        vision=dict(
            depth=1, hidden_size=128, intermediate_size=256, out_hidden_size=128, num_heads=4,
            num_position_embeddings=64, deepstack_visual_indexes=[0], initializer_range=128**-0.5),
        prompt="Think, then embed.", limits=TINY_LIMITS),
    # What Qwen/Qwen2-VL-2B-Instruct's config.json says; for memory and speed, not to be trained from scratch
    "qwen2vl_2b": dict(
        text=dict(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768,
            rope_parameters=rope(1e6, 16, 24, 24)),
        vision=dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
        limits={}),
    # and Qwen/Qwen3-VL-2B-Instruct's
    "qwen3vl_2b": dict(
        backbone="qwen3_vl",
        text=dict(
            hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
            head_dim=128, num_key_value_heads=8, vocab_size=151936, max_position_embeddings=262144,
            rope_parameters=rope(5e6, 24, 20, 20)),
        vision=dict(
            depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2048, num_heads=16,
            deepstack_visual_indexes=[5, 11, 17]),
        limits={}),
    # For measuring speed on a CPU
    "mid": dict(
        text=dict(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=8192, rope_parameters=rope(1e6, 8, 12, 12)),
        vision=dict(depth=8, embed_dim=320, hidden_size=512, num_heads=8, mlp_ratio=4),
        prompt="Think, then embed.", limits={}),
}


def config_of(shape, model_type, tokenizer, tied):
    """A value of SHAPES -> transformers' configuration; tied: the output embedding is the input embedding."""
    in_blocks_of_64 = -(-len(tokenizer) // 64) * 64
    text = dict(vocab_size=in_blocks_of_64, bos_token_id=None, eos_token_id=None) | shape["text"]
    special = {f"{name.replace('_pad', '')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
               for name in SPECIAL_IDS}
    return AutoConfig.for_model(
        model_type, text_config=text, vision_config=shape["vision"], tie_word_embeddings=tied, **special)
