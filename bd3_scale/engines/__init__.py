from bd3_scale import megatron_core as megatron_core  # before an engine imports more of megatron-core
