"""What a number in a configuration counts, by the name of its field."""

from __future__ import annotations

import re

HIDDEN_NAMES = (
    *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "encoder_hidden_dim", "width", "emb_dim"),
    *("attention_hidden_size", "embed_dims", "hidden_sizes", "neck_hidden_sizes", "encoder_hidden_size", "d_latents"),
    *("decoder_hidden_size", "base_channels", "num_filters", "codebook_dim", "conv_dim", "channels", "embedding_size"),
)
HEADS_NAME = re.compile(r"(^|_)(n_?heads?|num_heads?|attention_heads|heads|num_attention_heads_per_layer|kv_n_heads)$")
NOT_HEADS_NAME = re.compile(r"head_dim|head_size|layers|dim_head")
DEPTH_NAME = re.compile(
    r"(^|_)(n_?layers?|n_layer|layers|depth|num_blocks|num_layers_per_stack|num_res_blocks|blocks_per_stage)$"
)
NOT_DEPTH_NAME = re.compile(
    r"window_layers|feat|drop|_at_|proj_layers|prompt_layers|nextn|mtp|skip|shared_layers|vision_"
)
EXPERTS_NAME = re.compile(
    r"(^|_)(n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts|zero_expert_num)$"
)
CHOSEN_NAME = re.compile(
    r"(experts_per_tok|moe_topk|moe_k|top_k_experts|moe_top_k|topk|num_selects|num_experts_per_token)$"
)
SHARED_EXPERTS_NAME = re.compile(r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)$")
VOCABULARY_NAME = re.compile(
    r"(vocab_size|vocabulary_size|codebook_size|num_hash_buckets|vocab|num_embeds|num_embeddings|vocab_size_per_layer_input)$"
)
ID_NAME = re.compile(
    r"(token_id|token_index|token_ids|token_idx|[a-z]_id|_ids|_bos_id|begin_suppress_tokens|suppress_tokens)$"
)
NOT_ID_NAME = re.compile(r"layer|gradient|hook|prompt_id")
IMAGE_NAME = re.compile(r"(^|_)(image_size|img_size|input_image_size|pretrain_image_size|crop_size|image_resolution)$")
PATCH_NAME = re.compile(r"(^|_)patch_size$")
POSITIONS_NAME = re.compile(
    r"(max_.*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|context_length|"
    r"model_max_length|max_encoder_position_embeddings|max_text_len|max_ep_len|text_encoder_context_length|position_embedding_size)$"
)
COUNTS_NAME = re.compile(
    r"(num_patches|num_position_embeddings|image_seq_length|image_seq_len|tokens_per_image|num_image_tokens|"
    r"soft_tokens_per_image|image_token_num|num_latents|latent_query_num|query_num|num_queries|num_query_tokens|"
    r"num_object_queries|num_detection_tokens|resampler_n_latents|num_global_tokens|num_landmarks|num_proposals)$"
)
DERIVED_NAMES = frozenset(
    {"stage_names", "out_features", "ignore_keys_at_rope_validation", "down_ops"}
    | {"dim_bbox_sinusoid_emb_2d", "dim_bbox_sinusoid_emb_1d", "dim_bbox_projection", "image_embedding_size"}
)
INTERVAL_NAME = re.compile(
    r"(_interval|_period|_frequency|_freq|_every_n_layers|_step|_pattern|_layer_step|sparse_step|layer_group_size)$"
)
OFFSET_NAME = re.compile(r"_layer_offset$")
LAYER_INDICES_NAME = re.compile(
    r"(out_indices|block_indexes|attn_indexes|visual_indexes|layer_ids?|layers_indices|_indices|_idxs|feature_layer|"
    r"feature_layers|hook_ids|layer_indices|moe_layers|cross_attention_layers|select_layer|target_layers|"
    r"extract_layers|vision_layer|proj_layers|source_layers|scaling_layers|layer_index|layer_index_start|"
    r"layer_index_end|layer_start_index|layer_end_index|hidden_layer|subsample_layers|only_layers|fullatt_block)$"
)
USED_LAYERS_NAME = re.compile(
    r"out_indices|hook_ids|layers_indices|extract_layers|feature_layers|state_indices|target_layers"
)
WINDOW_NAME = re.compile(
    r"(sliding_window|attention_window|attention_window_size|local_attention|window_size|sliding_window_size)$"
)
CHUNK_NAME = re.compile(
    r"^(chunk_size|block_size|index_topk|mamba_chunk_size|mamba_chunk_length|lsh_attn_chunk_length|"
    r"local_attn_chunk_length|conv_chunksize|chunk_length)$"
)
MEL_NAME = re.compile(
    r"(num_mel_bins|n_mel_bins|input_feat_per_channel|input_feat_size|num_mel_channels|feature_size|model_in_dim)$"
)
LABELS_NAME = re.compile(r"(num_labels|num_classes|num_qa_labels|num_object_labels|num_attr_labels|num_ctc_classes)$")
WIDTH_NAME = re.compile(
    r"(size|dim|dims|width|channels?|inner|units|sizes|rank|features|ffn|d_[a-z]+|dff|d_ff|features_sizes|inplanes|"
    r"filters|embed_dims|hidden_dims|out_channel|n_inner|d_ssm|kv_channels|_planes|d_state|dim_base|dim_feedforward|"
    r"attn_unit_dims|bottleneck|n_embd|upsample_groups|hidden_dimension|hidden_size_global|hidden_size_per_layer_input|_per_stage|channel_list|"
    r"pooler_output_size|pooler_hidden_size|in_features|out_features_size)(_mlp|_2d|_1d)?$"
)
NOT_WIDTH_NAME = re.compile(
    r"kernel|stride|chunk|batch|step|vocab|window|image|patch|max_|merge|num_channels|temporal|(?<!_)pool_|pooling|block|conv_size|"
    r"^in_channels$|^out_channels$|audio_channels|num_mel|spatial|frame|cluster|type|crop|(?<!upsample_)groups|min_|scale|eval|"
    r"^input_size$|in_chans|tubelet|grid|position_embedding_size|codebook_size|query|init(?!ial)|logit|pos_emb|final_size"
)
