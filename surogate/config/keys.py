"""Keys that are accepted without effect, and keys that are known and not there yet."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRAIN_WITHOUT_EFFECT = _words("""
    agent_template apply_recommended_values attn_bwd_chunks debug_memory_breakdown debug_time_breakdown fp4_backend
    init_projections_to_zero lora_target_linear memcpy_all_gather memcpy_send_recv norm_bbox offload_grads
    offload_master offload_quants offload_residual padding_free persistent_quants shard_gradients shard_weights
    transport_type turn_diagnostics use_all_to_all_reduce use_cuda_graphs use_fused_rope use_write_combined
    use_zero_copy weight_broadcast_type
""")
TRAIN_NOT_YET = _words("""
    aim_experiment aim_name aim_repo distillation dpo_beta ep_load_balance_threshold ep_plan_refresh_interval ep_size
    length_norm long_context max_pixels parallelism qlora_offload_experts qlora_selective_expert_dequant
    reference_free router_aux_loss_coef router_z_loss_coef sequence_chunks sequence_parallel_size span_mask
    target_margin train_router train_vision type
""")
INFER_WITHOUT_EFFECT = _words("weight_broadcast_type")
INFER_NOT_YET = _words("enable_auto_tool_choice reasoning_parser")
ORCH_WITHOUT_EFFECT = _words("rollout_transport use_token_client weight_broadcast")
ORCH_NOT_YET = _words("teacher_model")
CLIENT_WITHOUT_EFFECT = _words("api_key_var elastic skip_model_check")
CHECKPOINT_WITHOUT_EFFECT = _words("wait_for_weights_timeout")
DISTRIBUTED_WITHOUT_EFFECT = _words("ray_address worker_output_dir")
