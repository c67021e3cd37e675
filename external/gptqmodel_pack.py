# SPDX-FileCopyrightText: 2024-2026 ModelCloud.ai
# SPDX-FileCopyrightText: 2024-2026 qubitium@modelcloud.ai
# SPDX-License-Identifier: Apache-2.0
#
# The packer of GPTQModel 7.7.0 (https://github.com/ModelCloud/GPTQModel), an oracle for the tests; lowbit itself does
# not use it. Verbatim from BaseQuantLinear.pack_original in gptqmodel/nn_modules/qlinear/__init__.py, from
# convert_gptq_v2_to_v1_format_module and convert_gptq_v1_to_v2_format_module in gptqmodel/utils/model.py and from
# gptqmodel/utils/model_dequant.py. Changed: other widths than 2, 3, 4 and 8 bits in int32 words, embeddings and
# convolutions are left out, and methods became functions. The licence: https://www.apache.org/licenses/LICENSE-2.0
import math

import numpy as np
import torch
import torch as t


class QuantLinear:
    """Version 2: `qzeros` holds zero points as they are."""

    pack_dtype_bits = 32
    planar = False
    pack_np_math_dtype = np.uint32
    pack_np_dtype = np.int32

    def __init__(self, bits, g_idx):
        self.bits = bits
        self.maxq = 2**bits - 1
        self.pack_factor = 32 // bits
        self.g_idx = g_idx

    def pack_original(self, W, scales, zeros):
        scales = scales.T.contiguous()
        zeros = zeros.T.contiguous()
        scale_zeros = zeros * scales
        self.scales = scales.to(dtype=t.float16)
        int_weight = t.round((W + scale_zeros[self.g_idx].T) / scales[self.g_idx].T)
        int_weight.clamp_(0, self.maxq)
        int_weight = int_weight.to(t.int32)
        int_weight = int_weight.T.contiguous()
        int_weight = int_weight.numpy().astype(self.pack_np_math_dtype)

        qweight = np.zeros((math.ceil(int_weight.shape[0] * self.bits / self.pack_dtype_bits), int_weight.shape[1]),
                           dtype=self.pack_np_math_dtype)
        if self.bits in [2, 4, 8]:
            for row in range(qweight.shape[0]):
                for j in range(min(self.pack_factor, int_weight.shape[0] - row * self.pack_factor)):
                    qweight[row] |= int_weight[row * self.pack_factor + j] << (self.bits * j)
        elif self.bits == 3 and not self.planar:
            i = 0
            row = 0
            while row < qweight.shape[0]:
                for j in range(i, i + 10):
                    qweight[row] |= int_weight[j] << (3 * (j - i))
                i += 10
                qweight[row] |= int_weight[i] << 30
                row += 1
                qweight[row] |= (int_weight[i] >> 2) & 1
                i += 1
                for j in range(i, i + 10):
                    qweight[row] |= int_weight[j] << (3 * (j - i) + 1)
                i += 10
                qweight[row] |= int_weight[i] << 31
                row += 1
                qweight[row] |= (int_weight[i] >> 1) & 0x3
                i += 1
                for j in range(i, i + 10):
                    qweight[row] |= int_weight[j] << (3 * (j - i) + 2)
                i += 10
                row += 1

        self.qweight = t.from_numpy(qweight.astype(self.pack_np_dtype))

        zeros = zeros.numpy().astype(self.pack_np_math_dtype)
        qzeros = np.zeros((zeros.shape[0], math.ceil(zeros.shape[1] * self.bits / self.pack_dtype_bits)), dtype=self.pack_np_math_dtype)
        if self.bits in [2, 4, 8]:
            for col in range(qzeros.shape[1]):
                for j in range(min(self.pack_factor, zeros.shape[1] - col * self.pack_factor)):
                    qzeros[:, col] |= zeros[:, col * self.pack_factor + j] << (self.bits * j)
        elif self.bits == 3 and not self.planar:
            i = 0
            col = 0
            while col < qzeros.shape[1]:
                for j in range(i, i + 10):
                    qzeros[:, col] |= zeros[:, j] << (3 * (j - i))
                i += 10
                qzeros[:, col] |= zeros[:, i] << 30
                col += 1
                qzeros[:, col] |= (zeros[:, i] >> 2) & 1
                i += 1
                for j in range(i, i + 10):
                    qzeros[:, col] |= zeros[:, j] << (3 * (j - i) + 1)
                i += 10
                qzeros[:, col] |= zeros[:, i] << 31
                col += 1
                qzeros[:, col] |= (zeros[:, i] >> 1) & 0x3
                i += 1
                for j in range(i, i + 10):
                    qzeros[:, col] |= zeros[:, j] << (3 * (j - i) + 2)
                i += 10
                col += 1
        self.qzeros = t.from_numpy(qzeros.astype(self.pack_np_dtype))


def _unpack_cols_3bit(packed: torch.Tensor) -> torch.Tensor:
    rows, cols = packed.shape
    if cols % 3 != 0:
        raise ValueError(f"3-bit GPTQ qzeros expects columns divisible by 3, got shape {tuple(packed.shape)}")

    blocks = cols // 3
    words = packed.to(torch.int64).reshape(rows, blocks, 3)
    word0 = words[:, :, 0]
    word1 = words[:, :, 1]
    word2 = words[:, :, 2]

    result = torch.empty((rows, blocks * 32), dtype=torch.int32, device=packed.device)
    unpacked = result.view(rows, blocks, 32)

    for idx in range(10):
        unpacked[:, :, idx] = ((word0 >> (3 * idx)) & 0x7).to(torch.int32)

    unpacked[:, :, 10] = (
        ((word0 >> 30) & 0x3) | (((word1 >> 0) << 2) & 0x4)
    ).to(torch.int32)

    for idx in range(10):
        unpacked[:, :, 11 + idx] = ((word1 >> (1 + 3 * idx)) & 0x7).to(torch.int32)

    unpacked[:, :, 21] = (
        ((word1 >> 31) & 0x1) | (((word2 >> 0) << 1) & 0x6)
    ).to(torch.int32)

    for idx in range(10):
        unpacked[:, :, 22 + idx] = ((word2 >> (2 + 3 * idx)) & 0x7).to(torch.int32)

    return result


def _pack_cols_3bit(values: torch.Tensor, *, pack_dtype: torch.dtype) -> torch.Tensor:
    pack_bits = torch.empty((), dtype=pack_dtype).element_size() * 8
    if pack_bits != 32:
        raise NotImplementedError(
            f"3-bit GPTQ safetensor dequantization expects 32-bit packed words, got {pack_bits}-bit words."
        )

    rows, cols = values.shape
    if cols % 32 != 0:
        raise ValueError(f"3-bit GPTQ qzeros expects columns divisible by 32, got shape {tuple(values.shape)}")

    blocks = cols // 32
    values_i64 = (values.to(torch.int64) & 0x7).reshape(rows, blocks, 32)
    mask32 = (1 << 32) - 1

    word0 = torch.zeros((rows, blocks), dtype=torch.int64, device=values.device)
    for idx in range(10):
        word0 |= values_i64[:, :, idx] << (3 * idx)
    word0 |= values_i64[:, :, 10] << 30

    word1 = (values_i64[:, :, 10] >> 2) & 0x1
    for idx in range(10):
        word1 |= values_i64[:, :, 11 + idx] << (1 + 3 * idx)
    word1 |= values_i64[:, :, 21] << 31

    word2 = (values_i64[:, :, 21] >> 1) & 0x3
    for idx in range(10):
        word2 |= values_i64[:, :, 22 + idx] << (2 + 3 * idx)

    packed = torch.stack((word0, word1, word2), dim=2).reshape(rows, blocks * 3)
    return (packed & mask32).to(pack_dtype)


def _shift_gptq_qzeros_3bit(qzeros: torch.Tensor, bits: int, *, delta: int) -> torch.Tensor:
    zeros = _unpack_cols_3bit(qzeros)
    shifted = (zeros + delta) & ((1 << bits) - 1)
    return _pack_cols_3bit(shifted, pack_dtype=qzeros.dtype)


def convert_gptq_v2_to_v1_format_module(qzeros, bits):
    qzeros = qzeros.clone()
    if bits == 2:
        qzeros -= 0b01010101010101010101010101010101
    elif bits == 3:
        qzeros.copy_(_shift_gptq_qzeros_3bit(qzeros, bits, delta=-1))
    elif bits == 4:
        qzeros -= 0b00010001000100010001000100010001
    elif bits == 8:
        qzeros -= 0b00000001000000010000000100000001
    return qzeros


def convert_gptq_v1_to_v2_format_module(qzeros, bits):
    qzeros = qzeros.clone()
    if bits == 2:
        qzeros += 0b01010101010101010101010101010101
    elif bits == 3:
        qzeros.copy_(_shift_gptq_qzeros_3bit(qzeros, bits, delta=1))
    elif bits == 4:
        qzeros += 0b00010001000100010001000100010001
    elif bits == 8:
        qzeros += 0b00000001000000010000000100000001
    return qzeros
