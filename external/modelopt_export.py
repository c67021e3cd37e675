# Parts of nvidia_modelopt 0.47.0 (https://github.com/NVIDIA/Model-Optimizer): an oracle for the tests; lowbit itself does
# not use it. The four functions of torch/export/quant_utils.py are verbatim, less their debug messages; `nvfp4_quantize`
# and `nvfp4_dequantize` are the bodies of NVFP4QTensor._cast_fp4, quantize and dequantize
# (torch/quantization/qtensor/nvfp4_tensor.py) as functions, without padding, devices and the TensorRT-LLM kernels.
#
# SPDX-FileCopyrightText: Copyright (c) 2024 NVIDIA CORPORATION & AFFILIATES. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
# http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from collections.abc import Generator
from typing import Any

import torch

QUANTIZATION_NONE = None
e2m1_bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
e2m1_values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _prefix_wildcard_summarize_exclude_modules(unquantized_layers, quantized_layers):
    """Generate a summarization of the quantization layer configs using prefix wildcards.

    Prefix wildcards means we only consider wildcards that is a prefix with a star in the end.
    We do not consider other wildcards such as: a*b.
    """

    def all_matching_prefix_wildcards(name):
        # include all possible prefix wildcards, and the exact name itself
        wildcards = {name}
        for i in range(len(name) + 1):
            wildcards.add(name[:i] + "*")
        return wildcards

    def next_formatted_matching_prefix_wildcards(name: str) -> Generator[list[str], None, None]:
        """Enumerate formatted prefix wildcards. A result may be a combination of prefix wildcards.

        Formatted here means we only consider wildcards at dot split. We need two patterns.

        1. a single wildcard: module_name*
        2. a set of 2 wildcards: {module_name, module_name.*}. We need this pattern set because
           module_name* may match other modules with module_name as a prefix.
        """
        for i in range(len(name)):
            if name[i] == ".":
                yield [name[:i] + "*"]
                yield [name[:i], name[:i] + ".*"]
        # in the end, itself only is a wildcard
        yield [name]

    # any of the wildcard in this set cannot be present in the result
    negative_wild_candidates = set()
    for layer in quantized_layers:
        negative = all_matching_prefix_wildcards(layer)
        negative_wild_candidates.update(negative)

    res_summary = set()
    for layer in unquantized_layers:
        candidate_wildcards = []
        for wildcards in next_formatted_matching_prefix_wildcards(layer):
            if any(wildcard in negative_wild_candidates for wildcard in wildcards):
                # need a more specific wildcard
                continue
            if all(wildcard in res_summary for wildcard in wildcards):
                # we get covered already, do not need to move forward, and clear candidate
                candidate_wildcards = []
                break
            # find one, now terminate the search
            candidate_wildcards = wildcards
            break
        # When candidate is the pair [prefix, prefix+".*"], emit only prefix+".*" for deployment.
        if len(candidate_wildcards) == 2:
            a, b = sorted(candidate_wildcards, key=len)
            if b == a + ".*":
                res_summary.add(b)
            else:
                res_summary.update(candidate_wildcards)
        else:
            res_summary.update(candidate_wildcards)
    return res_summary


def process_layer_quant_config(layer_config_dict):
    """Processes per layer quantization information for TRTLLM export to quant_cfg.json."""
    per_layer_config: dict[str, Any] = {
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        "quantized_layers": {},
    }
    layer_config: dict[str, Any] = {}
    # Set of quantization formats used.
    quantization_formats = set()
    quantization_config = None
    exclude_modules = []

    for k, v in layer_config_dict.items():
        if "awq_block_size" in k:
            continue

        # Get layer name for constructing quantized_layers dictionary under per_layer_config
        prefix = ".".join(k.rsplit(".", 1)[:-1])
        awq_key = prefix + ".awq_block_size"

        # Get the corresponding AWQ block size
        block_size_value = layer_config_dict.get(awq_key, 0)

        if v == "fp8":
            layer_config = {"quant_algo": "FP8"}
        elif v == "fp8_pc_pt":
            layer_config = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
        elif v == "int4_awq":
            layer_config = {
                "quant_algo": "W4A16_AWQ",
                "group_size": block_size_value,
                "has_zero_point": False,
                "pre_quant_scale": True,
            }
        elif v == "w4a8_awq":
            layer_config = {
                "quant_algo": "W4A8_AWQ",
                "group_size": block_size_value,
                "has_zero_point": False,
                "pre_quant_scale": True,
            }
        elif v == "int8_wo":
            layer_config = {"quant_algo": "W8A16"}
        elif v == "int8_sq":
            layer_config = {"quant_algo": "W8A8_SQ_PER_CHANNEL"}
        elif v in ["nvfp4", "nvfp4_static"]:
            layer_config = {
                "quant_algo": "NVFP4",
                "group_size": block_size_value,
            }
        elif v == "w4a16_nvfp4":
            layer_config = {
                "quant_algo": "W4A16_NVFP4",
                "group_size": block_size_value,
            }
        elif v == "nvfp4_awq":
            layer_config = {
                "quant_algo": "NVFP4_AWQ",
                "group_size": block_size_value,
                "has_zero_point": False,
                "pre_quant_scale": True,
            }
        elif v == "w4a8_nvfp4_fp8":
            layer_config = {
                "quant_algo": "W4A8_NVFP4_FP8",
                "group_size": block_size_value,
            }
        elif v == "w4a8_mxfp4_fp8":
            layer_config = {
                "quant_algo": "W4A8_MXFP4_FP8",
                "group_size": block_size_value,
            }
        elif v == "nvfp4_svdquant":
            # SVDQuant builds on the AWQ-style pre_quant_scale smoothing, so its
            # config mirrors nvfp4_awq (group_size + pre_quant_scale flag).
            layer_config = {
                "quant_algo": "NVFP4_SVD",
                "group_size": block_size_value,
                "has_zero_point": False,
                "pre_quant_scale": True,
            }
        elif v == "mxfp8":
            layer_config = {
                "quant_algo": "MXFP8",
                "group_size": block_size_value,
            }
        else:
            layer_config = {"quant_algo": v}

        if layer_config["quant_algo"] != QUANTIZATION_NONE:
            quantization_formats.add(str(layer_config))
            quantization_config = layer_config
            per_layer_config["quantized_layers"].update({prefix: layer_config})
        else:
            exclude_modules.append(prefix)

    # If we have more than one quantization format, infer MIXED_PRECISION
    if len(quantization_formats) > 1:
        per_layer_config["quant_algo"] = "MIXED_PRECISION"
    elif len(quantization_formats) == 1 and quantization_config is not None:
        per_layer_config.update(quantization_config)
        per_layer_config["exclude_modules"] = sorted(
            _prefix_wildcard_summarize_exclude_modules(
                exclude_modules, per_layer_config["quantized_layers"].keys()
            )
        )
        per_layer_config.pop("quantized_layers")

    return per_layer_config


def _validate_int4_block_size(in_dim, block_size):
    if not isinstance(block_size, int) or block_size <= 0:
        raise ValueError(f"Block size must be a positive integer, got {block_size}.")
    if in_dim % block_size != 0:
        raise NotImplementedError(
            f"Cannot pack weight with input dimension {in_dim} and block size {block_size}: "
            "partial blocks are not supported."
        )


def pack_int4_in_uint8(weight, weights_scaling_factor, block_size):
    """Packs the INT4 weights into uint8 tensor."""
    out_dim = weight.shape[-2]
    assert out_dim % 2 == 0, f"Cannot pack weight. Out dimension {out_dim} is not an even number."
    in_dim = weight.shape[-1]
    _validate_int4_block_size(in_dim, block_size)

    # Scale, round, and clamp to the signed 4-bit range [-8..7].
    int8_tensor = (
        (weight / weights_scaling_factor[..., :, torch.arange(in_dim) // block_size])
        .round()
        .clamp(-8, 7)
        .to(torch.int8)
    )

    # -- Handle the MoE (3D) case vs. the 2D case --
    if int8_tensor.dim() == 3:
        # Dimensions might be (experts, out_dim, in_dim)
        transpose = int8_tensor.permute(0, 2, 1)  # -> (experts, in_dim, out_dim)
        # Reshape to group two output channels (out_dim // 2) and keep an extra dimension of size 2
        transpose = transpose.reshape(-1, in_dim, out_dim // 2, 2)  # (E, in_dim, out_dim//2, 2)

        # Pack two 4-bit values (val0,val1) into a single byte:
        val0 = transpose[..., 0] & 0x0F
        val1 = transpose[..., 1] & 0x0F
        packed_byte = val0 | (val1 << 4)

        # Transpose back to the shape (experts, out_dim // 2, in_dim)
        return packed_byte.permute(0, 2, 1).contiguous().view(torch.uint8)

    else:
        # 2D weights: shape typically (out_dim, in_dim)
        # Transpose to (in_dim, out_dim)
        reshaped = int8_tensor.T.reshape(in_dim, out_dim // 2, 2)

        # Pack two 4-bit values into one byte
        val0 = reshaped[..., 0] & 0x0F
        val1 = reshaped[..., 1] & 0x0F
        packed_byte = val0 | (val1 << 4)

        # Return shape (out_dim // 2, in_dim)
        return packed_byte.T.contiguous().view(torch.uint8)


def _cast_fp4(weight: torch.Tensor):
    # Extract sign and compute absolute values in one pass
    sign_bit = (weight < 0).to(torch.uint8)
    weight_abs = weight.abs_()

    # Get bounds and compute ordinal values
    ord = torch.searchsorted(e2m1_bounds, weight_abs, out_int32=True).to(torch.uint8)

    # Efficiently check for rounding at odd-indexed bounds [0.75, 1.75, 3.5]
    # Only need to check bounds at indices 1, 3, 5
    odd_bounds = e2m1_bounds[[1, 3, 5]]  # [0.75, 1.75, 3.5]
    equals_odd_bounds = torch.any(weight_abs.unsqueeze(-1) == odd_bounds, dim=-1).to(torch.uint8)

    # Combine sign, ordinal, and rounding adjustment
    return (sign_bit << 3) + ord + equals_odd_bounds


def nvfp4_quantize(input, block_size, weights_scaling_factor, weights_scaling_factor_2):
    # Reshape the weight and scale factors
    original_shape = input.shape
    input = input.view((*tuple(input.shape[:-1]), -1, block_size))

    # Scale weights
    scaled_weight = input / (
        (weights_scaling_factor.to(torch.float32) * weights_scaling_factor_2).unsqueeze(-1)
    )

    # Reshape weights to original
    scaled_weight = scaled_weight.view(original_shape)

    # Cast weights to fp4
    q_weight = _cast_fp4(scaled_weight)
    # Pack weights
    return (q_weight[..., 1::2] << 4) | q_weight[..., 0::2]


def nvfp4_dequantize(quantized_data, dtype, shape, scale, double_scale, block_size):
    def _unpack_tensor(input: torch.Tensor):
        # Initialize storage for unpacked tensor
        unpacked_shape = list(input.shape)
        unpacked_shape[-1] = unpacked_shape[-1] * 2
        unpacked = torch.empty(unpacked_shape, dtype=dtype, device=input.device)

        unpacked[..., 1::2] = input >> 4
        unpacked[..., 0::2] = input & 0x0F

        unpacked = unpacked.reshape(-1)
        unpacked = e2m1_values[unpacked.long()]

        return unpacked.reshape(unpacked_shape)

    q_per_block_scale = scale.to(torch.float32) if scale.dtype == torch.float8_e4m3fn else scale

    # Dequantize scales
    per_block_scale = q_per_block_scale * double_scale

    # Unpack and unscale weights
    deq_data = _unpack_tensor(quantized_data)

    deq_data = deq_data.view((*tuple(deq_data.shape[:-1]), -1, block_size)) * per_block_scale.unsqueeze(-1)
    return deq_data.reshape(shape).to(dtype)
