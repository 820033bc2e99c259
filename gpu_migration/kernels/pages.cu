// What is done to pages of 4 KiB on a GPU. Each kernel reads its pages once; one warp has one page, eight loads of 16 bytes a lane, so that a warp's loads are
// whole lines and eight are on their way at once.
//
// It compiles with NVRTC (no headers), with nvcc, and with g++ under the header of the tests that runs threads as fibers. So: no C++ library, and lanes meet only
// at *_sync functions and __syncthreads, which every thread that is named there reaches.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define LANES 32u
#define WARPS 8u                 // of a block of those kernels that have a warp a page
#define VECTORS 256u             // of 16 bytes in a page
#define EXTENT_PAGES 256u        // pages of an extent, and threads of a block of rank_pages
#define SCAN_WARPS 32u           // of the one block of scan_counts
#define ALL 0xffffffffu
#define NOWHERE 0xffffffffu      // position of a page that is not gathered
#define NO_BASE 0xffffffffu      // population of a page without a counterpart
#define FLAG_CONSTANT 1u
#define FLAG_UNCHANGED 2u

// Classes of the format, as in layout.py.
#define ZERO 0u
#define CONST 1u
#define UNCHANGED 2u
#define DUP 3u
#define DELTA 4u
#define RAW 5u
#define CODED 6u

// Keys of the page hash: word i has key (i + 1) * KEY, as in hashing.py.
#define KEY_A 0x9e3779b97f4a7c15ull
#define KEY_B 0xd6e8feb86659fd93ull

// Which words are sampled, four bytes of each, as in cpu.py.
#define SAMPLE_FIRST 17u
#define SAMPLE_STRIDE 61u

struct PageFacts {
    u64 hash_a, hash_b;
    u64 first;       // the first word: what a constant page is filled with
    u32 population;  // bits that differ from the base's page
    unsigned short distinct;  // values among the sampled bytes
    unsigned short flags;
};

__device__ __forceinline__ u64 product(u32 low, u32 high, u64 key) {
    return (u64)(low + (u32)key) * (u64)(high + (u32)(key >> 32));
}

// The finalizer of MurmurHash3: every bit of the sum reaches every bit of the hash.
__device__ __forceinline__ u64 spread(u64 sum) {
    sum ^= sum >> 33;
    sum *= 0xff51afd7ed558ccdull;
    sum ^= sum >> 33;
    sum *= 0xc4ceb9fe1a85ec53ull;
    return sum ^ (sum >> 33);
}

__device__ __forceinline__ u64 sum_over_warp(u64 value) {
    for (u32 step = LANES / 2; step; step >>= 1) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// Constant, hash, difference from the base and sampled bytes, all from one reading of the page.
extern "C" __global__ void __launch_bounds__(256)
scan_pages(const uint4* __restrict__ pages, const uint4* __restrict__ base, u32 count, u32 base_count, PageFacts* __restrict__ facts) {
    __shared__ u32 seen[WARPS][8];
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (u32 page = blockIdx.x * WARPS + warp; page < count; page += gridDim.x * WARPS) {
        const uint4* mine = pages + (u64)page * VECTORS;
        uint4 vector[8];
#pragma unroll
        for (u32 n = 0; n < 8; n++) vector[n] = mine[n * LANES + lane];
        const u32 first_low = __shfl_sync(ALL, vector[0].x, 0), first_high = __shfl_sync(ALL, vector[0].y, 0);
        u64 hash_a = 0, hash_b = 0;
        u64 key_a = (u64)(2 * lane + 1) * KEY_A, key_b = (u64)(2 * lane + 1) * KEY_B;
        u32 other = 0;
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            const uint4 v = vector[n];
            hash_a += product(v.x, v.y, key_a) + product(v.z, v.w, key_a + KEY_A);
            hash_b += product(v.x, v.y, key_b) + product(v.z, v.w, key_b + KEY_B);
            key_a += 2 * LANES * KEY_A;
            key_b += 2 * LANES * KEY_B;
            other |= (v.x ^ first_low) | (v.y ^ first_high) | (v.z ^ first_low) | (v.w ^ first_high);
        }
        u32 population = 0;
        if (page < base_count) {
            const uint4* theirs = base + (u64)page * VECTORS;
#pragma unroll
            for (u32 n = 0; n < 8; n++) {
                const uint4 b = theirs[n * LANES + lane];
                population += __popc(vector[n].x ^ b.x) + __popc(vector[n].y ^ b.y) + __popc(vector[n].z ^ b.z) + __popc(vector[n].w ^ b.w);
            }
        }
        const u8* bytes = (const u8*)mine;
        if (lane < 8) seen[warp][lane] = 0;
        __syncwarp();
        const u32 value = bytes[(SAMPLE_FIRST + SAMPLE_STRIDE * (lane / 4)) * 8 + lane % 4 * 2];
        atomicOr(&seen[warp][value / 32], 1u << (value % 32));
        __syncwarp();
        u32 distinct = lane < 8 ? __popc(seen[warp][lane]) : 0;
        __syncwarp();
        // Both numbers are small: they are summed as one.
        const u64 both = sum_over_warp(((u64)distinct << 32) | population);
        hash_a = sum_over_warp(hash_a);
        hash_b = sum_over_warp(hash_b);
        const u32 constant = __all_sync(ALL, other == 0);
        if (lane == 0) {
            PageFacts out;
            out.hash_a = spread(hash_a);
            out.hash_b = spread(hash_b);
            out.first = ((u64)first_high << 32) | first_low;
            const bool has_base = page < base_count;
            out.population = has_base ? (u32)both : NO_BASE;
            out.distinct = (unsigned short)(both >> 32);
            out.flags = (unsigned short)((constant ? FLAG_CONSTANT : 0) | (has_base && (u32)both == 0 ? FLAG_UNCHANGED : 0));
            facts[page] = out;
        }
    }
}

// Sections of what an extent sends of its pages, in their order: 1 raw, 2 coded, 3 deltas; 0 is not sent.
__device__ __forceinline__ u32 section_of(u32 kind) {
    return kind == RAW ? 1 : kind == CODED ? 2 : kind == DELTA ? 3 : 0;
}

// Of each page its place among those that its extent sends, and how many each extent sends. One block an extent, one thread a page.
extern "C" __global__ void __launch_bounds__(256) rank_pages(const u8* __restrict__ classes, u32 count, u32* __restrict__ places, u32* __restrict__ counts) {
    __shared__ u32 of_warp[3][WARPS];
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const u32 page = blockIdx.x * EXTENT_PAGES + threadIdx.x;
    const u32 section = page < count ? section_of(classes[page]) : 0;
    u32 before = 0;
    for (u32 s = 1; s <= 3; s++) {
        const u32 mates = __ballot_sync(ALL, section == s);
        if (lane == 0) of_warp[s - 1][warp] = __popc(mates);
        if (section == s) before = __popc(mates & ((1u << lane) - 1));
    }
    __syncthreads();
    u32 total = 0;
    for (u32 s = 1; s <= 3; s++)
        for (u32 w = 0; w < WARPS; w++) {
            if (s < section || (s == section && w < warp)) before += of_warp[s - 1][w];
            total += of_warp[s - 1][w];
        }
    if (page < count) places[page] = section ? before : NOWHERE;
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// Sums of all counts before each, and of all: `starts` has one more than `counts`. One block of 1024.
extern "C" __global__ void __launch_bounds__(1024) scan_counts(const u32* __restrict__ counts, u32 count, u32* __restrict__ starts) {
    __shared__ u32 sums[SCAN_WARPS];
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    u32 carried = 0;
    for (u32 tile = 0; tile < count; tile += SCAN_WARPS * LANES) {
        const u32 at = tile + threadIdx.x;
        const u32 value = at < count ? counts[at] : 0;
        u32 sum = value;
        for (u32 step = 1; step < LANES; step <<= 1) {
            const u32 left = __shfl_up_sync(ALL, sum, step);
            if (lane >= step) sum += left;
        }
        if (lane == LANES - 1) sums[warp] = sum;
        __syncthreads();
        if (warp == 0) {
            u32 mine = sums[lane];
            for (u32 step = 1; step < LANES; step <<= 1) {
                const u32 left = __shfl_up_sync(ALL, mine, step);
                if (lane >= step) mine += left;
            }
            sums[lane] = mine;
        }
        __syncthreads();
        if (at < count) starts[at] = carried + (warp ? sums[warp - 1] : 0) + sum - value;
        carried += sums[SCAN_WARPS - 1];
        __syncthreads();  // before the next tile's sums
    }
    if (threadIdx.x == 0) starts[count] = carried;
}

// What is sent, side by side: raw and coded pages as they are, deltas as XOR with the base.
extern "C" __global__ void __launch_bounds__(256)
gather_pages(const uint4* __restrict__ pages, const uint4* __restrict__ base, const u8* __restrict__ classes, const u32* __restrict__ places, const u32* __restrict__ starts, u32 count, uint4* __restrict__ dense) {
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (u32 page = blockIdx.x * WARPS + warp; page < count; page += gridDim.x * WARPS) {
        const u32 place = places[page];
        if (place == NOWHERE) continue;
        const uint4* from = pages + (u64)page * VECTORS;
        uint4* to = dense + (u64)(starts[page / EXTENT_PAGES] + place) * VECTORS;
        uint4 vector[8];
#pragma unroll
        for (u32 n = 0; n < 8; n++) vector[n] = from[n * LANES + lane];
        if (classes[page] == DELTA) {
            const uint4* theirs = base + (u64)page * VECTORS;
#pragma unroll
            for (u32 n = 0; n < 8; n++) {
                const uint4 b = theirs[n * LANES + lane];
                vector[n].x ^= b.x;
                vector[n].y ^= b.y;
                vector[n].z ^= b.z;
                vector[n].w ^= b.w;
            }
        }
#pragma unroll
        for (u32 n = 0; n < 8; n++) to[n * LANES + lane] = vector[n];
    }
}

// The way back: every page but the duplicates, which copy_pages brings afterwards.
extern "C" __global__ void __launch_bounds__(256)
scatter_pages(const uint4* __restrict__ dense, const uint4* __restrict__ base, const u8* __restrict__ classes, const u32* __restrict__ places, const u32* __restrict__ starts, const u64* __restrict__ fills, u32 count, uint4* __restrict__ pages) {
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (u32 page = blockIdx.x * WARPS + warp; page < count; page += gridDim.x * WARPS) {
        const u32 kind = classes[page];
        if (kind == DUP) continue;
        uint4* to = pages + (u64)page * VECTORS;
        uint4 vector[8];
        if (kind == ZERO || kind == CONST) {
            const u64 fill = kind == ZERO ? 0 : fills[page];
#pragma unroll
            for (u32 n = 0; n < 8; n++) vector[n] = make_uint4((u32)fill, (u32)(fill >> 32), (u32)fill, (u32)(fill >> 32));
        } else {
            const uint4* from = kind == UNCHANGED ? base + (u64)page * VECTORS : dense + (u64)(starts[page / EXTENT_PAGES] + places[page]) * VECTORS;
#pragma unroll
            for (u32 n = 0; n < 8; n++) vector[n] = from[n * LANES + lane];
            if (kind == DELTA) {
                const uint4* theirs = base + (u64)page * VECTORS;
#pragma unroll
                for (u32 n = 0; n < 8; n++) {
                    const uint4 b = theirs[n * LANES + lane];
                    vector[n].x ^= b.x;
                    vector[n].y ^= b.y;
                    vector[n].z ^= b.z;
                    vector[n].w ^= b.w;
                }
            }
        }
#pragma unroll
        for (u32 n = 0; n < 8; n++) to[n * LANES + lane] = vector[n];
    }
}

// Duplicates: page `to[n]` becomes what page `from[n]` is, which is none of those that are written.
extern "C" __global__ void __launch_bounds__(256) copy_pages(uint4* pages, const u32* __restrict__ to, const u32* __restrict__ from, u32 count) {
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (u32 n = blockIdx.x * WARPS + warp; n < count; n += gridDim.x * WARPS)
        for (u32 v = lane; v < VECTORS; v += LANES) pages[(u64)to[n] * VECTORS + v] = pages[(u64)from[n] * VECTORS + v];
}
