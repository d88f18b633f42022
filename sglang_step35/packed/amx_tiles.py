"""Products of 16 x 16 tiles of bfloat16 numbers by AMX, and what makes such tiles, as LLVM code.

The unit multiplies a tile of 16 rows of 32 columns by one of 16 pairs of columns, each with a word for every one of 16
other rows, and adds to 16 x 16 sums in float32 (Intel's Architecture Instruction Set Extensions, chapter 3). Both are
1 KB here, one behind the other for every 32 columns. Memory is given by its address; where lines of it begin with
lines of the cache, tiles are read at the unit's pace.
"""

import ctypes

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_step35.packed.int8_code import BYTE, LaneCode
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS, Format
from sglang_step35.vector_code import FLOAT, INT32, INT64, LINE, Code

SIDE = 16  # rows and sums of a tile
TILE = 1024  # bytes
_POINTER = BYTE.as_pointer()
_CONFIGURATION = [1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8]  # the unit's, 64 bytes
_ROWS, _PAIRS = (4, 5), (6, 7)  # registers of tiles; the sums of row tile i and pair tile j are in 2 i + j
_WORDS = ir.VectorType(INT32, SIDE)
_PRCTL, _REQUEST, _TILES = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of Linux


def supported() -> bool:
    """Whether this CPU has the unit and the system lets this process use it."""
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512bf16")):
        return False
    return ctypes.CDLL(None).syscall(_PRCTL, _REQUEST, _TILES) == 0


@intrinsic
def begin_tiles(typing):
    """Before `multiply_tiles`: all eight tiles have 16 rows of 64 bytes."""

    def generate(context, builder, signature, arguments):
        numbers = cgutils.create_constant_array(BYTE, _CONFIGURATION)
        place = cgutils.global_constant(builder, "tile_configuration", numbers)
        call(builder, "ldtilecfg", builder.ptrtoint(place, INT64))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def end_tiles(typing):
    """The thread has no tiles to keep any more."""

    def generate(context, builder, signature, arguments):
        call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def multiply_tiles(typing, rows, row_count, pairs, pair_count, tiles, sums):
    """sums [row count, pair count, SIDE, SIDE] = the products of one or two rows of tiles and one or two of pairs.

    rows [row count, tiles, TILE], pairs [pair count, tiles, TILE].
    """

    def generate(context, builder, signature, arguments):
        rows, row_count, pairs, pair_count, tiles, sums = arguments
        for i in (1, 2):
            for j in (1, 2):
                wanted = (builder.icmp_signed("==", a, INT64(b)) for a, b in ((row_count, i), (pair_count, j)))
                with builder.if_then(builder.and_(*wanted)):
                    _multiply(builder, rows, i, pairs, j, tiles, sums)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _multiply(builder, rows, row_count: int, pairs, pair_count: int, tiles, sums) -> None:
    products = [(i, j) for i in range(row_count) for j in range(pair_count)]
    for i, j in products:
        call(builder, "tilezero", 2 * i + j)
    apart, line = builder.mul(tiles, INT64(TILE)), INT64(LINE)
    with cgutils.for_range(builder, tiles) as loop:
        offset = builder.mul(loop.index, INT64(TILE))
        for base, registers in ((rows, _ROWS[:row_count]), (pairs, _PAIRS[:pair_count])):
            for number, register in enumerate(registers):
                place = builder.add(builder.add(base, offset), builder.mul(apart, INT64(number)))
                call(builder, "tileloadd64", register, place, line)
        for i, j in products:
            call(builder, "tdpbf16ps", 2 * i + j, _ROWS[i], _PAIRS[j])
    for number, (i, j) in enumerate(products):
        place = builder.add(sums, INT64(TILE * number))
        call(builder, "tilestored64", 2 * i + j, place, line)


@intrinsic
def lay_row(typing, kind, row, tiles, to):
    """A row's lines of the tiles that it is in: from the first one's at `to`, TILE apart.

    kind: np.float32, numbers that are rounded to bfloat16, or np.uint16, bfloat16 numbers.
    """
    is_wide = kind.dtype == types.float32

    def generate(context, builder, signature, arguments):
        _, row, tiles, to = arguments
        code = Code(builder)
        with cgutils.for_range(builder, tiles) as loop:
            start = code.shift(row, loop.index, COLUMNS * (4 if is_wide else 2))
            line = code.narrow(code.load(start, COLUMNS)) if is_wide else code.load_halves(start, COLUMNS)
            code.store_halves(line, code.shift(to, loop.index, TILE))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3), generate


@intrinsic
def lay_pairs(typing, places, tiles, to):
    """SIDE rows of float32 at addresses places [SIDE] as tiles of pairs of bfloat16: to [tiles, TILE]."""

    def generate(context, builder, signature, arguments):
        places, tiles, to = arguments
        code = Code(builder)
        rows = [code.integer(code.shift(places, r, 8)) for r in range(SIDE)]
        with cgutils.for_range(builder, tiles) as loop:
            wide = (code.load(code.shift(row, loop.index, 4 * COLUMNS), COLUMNS) for row in rows)
            lines = [builder.bitcast(code.narrow(numbers), _WORDS) for numbers in wide]
            _store_turned(code, lines, code.shift(to, loop.index, TILE), INT64(LINE))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def turn_words(typing, lines, to, apart):
    """The transpose of [SIDE, SIDE] words of 4 bytes, whose lines begin at `to` and so many bytes apart."""

    def generate(context, builder, signature, arguments):
        code = Code(builder)
        lines, to, apart = arguments
        _store_turned(code, [code.load(code.shift(lines, i, LINE), SIDE) for i in range(SIDE)], to, apart)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def split_sums(typing, sums, panels, left, right):
    """A row's sums by one or two panels [panels, TILE]: the first half of each to `left`, the second to `right`.

    right: 0 for nowhere.
    """

    def generate(context, builder, signature, arguments):
        sums, panels, left, right = arguments
        code, half = Code(builder), SIDE // 2
        for count in (1, 2):
            with builder.if_then(builder.icmp_signed("==", panels, INT64(count))):
                own = [code.load(code.shift(sums, j, TILE), SIDE) for j in range(count)]
                for begin, to in ((0, left), (half, right)):
                    lanes = [SIDE * j + begin + i for j in range(count) for i in range(half)]
                    with builder.if_then(builder.icmp_signed("!=", to, INT64(0))):
                        code.store(code.pick(own[0], own[-1], lanes), to)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def fetch_to_write(typing, address):
    """The line there comes nearer, to be written."""

    def generate(context, builder, signature, arguments):
        Code(builder).prefetch(arguments[0], writes=True)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic(prefer_literal=True)
def lay_interleaved(typing, kind, first, second, row, blocks, to):
    """8 interleaved rows of weights at `first` and 8 at `second`, of a literal kind of FORMATS, as tiles of pairs.

    row: bytes of one. blocks: of a row. to [blocks * groups of a block, TILE].
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        _, first, second, row, blocks, to = arguments
        chosen, code = FORMATS[kind.literal_value], LaneCode(builder, SIDE)
        shifts = [builder.mul(row, INT64(i)) for i in range(0, SIDE // 2, chosen.rows)]
        starts = [builder.add(stream, shift) for stream in (first, second) for shift in shifts]
        with cgutils.for_range(builder, blocks) as outer:
            here = [builder.add(start, builder.mul(outer.index, INT64(chosen.size))) for start in starts]
            with cgutils.for_range(builder, INT64(chosen.groups)) as inner:
                number = builder.add(builder.mul(outer.index, INT64(chosen.groups)), inner.index)
                _lay_group(code, chosen, here, inner.index, code.shift(to, number, TILE))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), generate


def _lay_group(code: LaneCode, chosen: Format, here: list, group, to) -> None:
    """32 columns: a tile."""
    builder = code.builder
    parts, minimum = chosen.unpack(code, here, group)
    for scale, columns in parts:
        zero = builder.fmul(scale, code.all(FLOAT, float(chosen.offset))) if minimum is None else minimum
        least = builder.fneg(zero)
        for column, weights in columns:
            words = builder.bitcast(weights, _WORDS)
            codes = (builder.and_(builder.lshr(words, code.all(INT32, 8 * i)), code.all(INT32, 255)) for i in range(4))
            values = [code.multiply_add(builder.sitofp(number, scale.type), scale, least) for number in codes]
            for i in (0, 2):
                pairs = code.narrow_pairs(values[i], values[i + 1])
                code.store_halves(pairs, builder.add(to, INT64(LINE * (column + i) // 2)))


def _store_turned(code: Code, lines: list, to, apart) -> None:
    """The transpose of 16 vectors of 16 words, `apart` bytes from line to line."""
    for other in (1, 2, 4, 8):  # lanes change places between the lines so far from each other
        low = [(lane & ~other) + (SIDE if lane & other else 0) for lane in range(SIDE)]
        high = [lane + other for lane in low]
        pairs = [(i, i + other) for i in range(SIDE) if not i & other]
        turned = {i: code.pick(lines[i], lines[j], low) for i, j in pairs}
        turned |= {j: code.pick(lines[i], lines[j], high) for i, j in pairs}
        lines = [turned[i] for i in range(SIDE)]
    for i, line in enumerate(lines):
        code.store(line, code.shift(to, apart, i))


def call(builder, name: str, *operands) -> None:
    """An instruction of the unit. operands: numbers of registers, then an address and the bytes from row to row."""
    numbers = [BYTE(operand) for operand in operands if isinstance(operand, int)]
    address = [builder.inttoptr(operand, _POINTER) for operand in operands[len(numbers) :][:1]]
    arguments = [*numbers, *address, *operands[len(numbers) + 1 :]]
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)
