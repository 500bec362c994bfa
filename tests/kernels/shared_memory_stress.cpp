// Ranks as threads on one mapping, so that the thread sanitizer sees all they share: random collectives in pieces, sums
// that are exact in every type, random delays; then a rank that stays away, and one that leaves. Prints "ok", or what
// was wrong. Arguments: ranks, rounds.
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "../../kernels/shared_memory.h"

using namespace shared_memory;

static std::atomic<int> wrong{0};

static void expect(bool right, const char* what, int rank, long round) {
    if (right) return;
    wrong++;
    std::fprintf(stderr, "rank %d, round %ld: %s\n", rank, round, what);
}

template <typename T>
static T number(int64_t value) {
    if constexpr (kIsWhole<T>) {
        return static_cast<T>(value);
    } else {
        return narrow<T>(static_cast<float>(value));
    }
}

// What rank `rank` gives; sums over 8 ranks stay below 256, which every type holds.
static int64_t part(int rank, long round, int64_t i) { return (rank * 7 + round * 3 + i) % 29 - 14; }

template <typename T>
static bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <typename T>
static void one_round(Group& group, int rank, int ranks, long round, int kind, int64_t rows, int64_t size) {
    size_t count = static_cast<size_t>(rows * size);
    std::vector<T> mine(count), total(count);
    for (size_t i = 0; i < count; i++) {
        int64_t sum = 0;
        for (int r = 0; r < ranks; r++) sum += part(r, round, static_cast<int64_t>(i));
        mine[i] = number<T>(part(rank, round, static_cast<int64_t>(i)));
        total[i] = number<T>(sum);
    }
    if (kind == 0) {
        expect(group.all_reduce(mine.data(), rows * size), "all_reduce failed", rank, round);
        expect(same(mine, total), "all_reduce is wrong", rank, round);
    } else if (kind == 1) {
        std::vector<T> all(count * static_cast<size_t>(ranks)), expected;
        expect(group.all_gather((const char*)mine.data(), (char*)all.data(), static_cast<int64_t>(count * sizeof(T))),
               "all_gather failed", rank, round);
        for (int r = 0; r < ranks; r++) {
            for (size_t i = 0; i < count; i++) expected.push_back(number<T>(part(r, round, static_cast<int64_t>(i))));
        }
        expect(same(all, expected), "all_gather is wrong", rank, round);
    } else if constexpr (!kIsWhole<T>) {
        std::vector<T> residual(count), weight(static_cast<size_t>(size)), normed(count), expected(count);
        for (size_t i = 0; i < count; i++) residual[i] = number<T>(static_cast<int64_t>(i) % 11 - 5);
        for (size_t i = 0; i < weight.size(); i++) weight[i] = number<T>(static_cast<int64_t>(i) % 3 + 1);
        bool with = round % 3 != 0;
        const T* old = with ? residual.data() : nullptr;
        expect(group.reduce_add_norm<T>(mine.data(), old, weight.data(), normed.data(), rows, size, 1e-5f),
               "reduce_add_norm failed", rank, round);
        for (int64_t at = 0; at < rows * size; at += size) {
            const T* row = old ? old + at : nullptr;
            add_norm_row<T>(total.data() + at, row, weight.data(), expected.data() + at, size, 1e-5f);
        }
        expect(same(mine, total), "the sum is wrong", rank, round);
        expect(same(normed, expected), "the norm is wrong", rank, round);
    }
}

static void run_rank(char* base, int rank, int ranks, long rounds) {
    Group group(base, rank, 30.0);
    if (!group.claim()) return expect(false, "could not claim its place", rank, -1);
    while (group.absent()) sched_yield();
    std::mt19937 shared(1), own(static_cast<unsigned>(rank) + 100);  // `shared` gives all ranks the same
    for (long round = 0; round < rounds; round++) {
        int kind = static_cast<int>(shared() % 3), type = static_cast<int>(shared() % 5);
        int64_t rows = shared() % 6, size = shared() % 200 + 1;
        if (shared() % 40 == 0) size += 2000;  // more than a slot
        bool two_shots = shared() % 2;
        group.set_crossover({two_shots ? 0 : 1 << 30, two_shots ? 0 : 1 << 30});
        unsigned chance = own() % 16;
        if (chance == 0) {
            usleep(own() % 500);
        } else if (chance < 4) {
            sched_yield();
        }
        if (type == 0) one_round<float>(group, rank, ranks, round, kind, rows, size);
        if (type == 1) one_round<BFloat16>(group, rank, ranks, round, kind, rows, size);
        if (type == 2) one_round<_Float16>(group, rank, ranks, round, kind, rows, size);
        if (type == 3) one_round<uint32_t>(group, rank, ranks, round, kind % 2, rows, size);
        if (type == 4) one_round<uint64_t>(group, rank, ranks, round, kind % 2, rows, size);
    }
    if (rank == ranks - 1) return group.leave();
    float x = 1.0f;
    expect(!group.all_reduce(&x, 1), "a collective without a rank that left did not fail", rank, rounds);
    expect(group.failure() >> 60 == kClosed, "the reason is not that a rank left", rank, rounds);
    expect(static_cast<uint32_t>(group.failure()) == 1u << (ranks - 1), "another rank is named", rank, rounds);
    expect(!group.all_reduce(&x, 1), "a failed group took a call", rank, rounds);
}

static void run_late(char* base, int rank, int ranks, double timeout) {
    Group group(base, rank, timeout);
    if (!group.claim()) return expect(false, "could not claim its place", rank, -2);
    if (rank == ranks - 1) return;  // is there, and calls nothing
    float x = 1.0f;
    expect(!group.all_reduce(&x, 1), "a collective that a rank never joined did not fail", rank, -2);
    expect(group.failure() >> 60 == kLate, "the reason is not that a rank was late", rank, -2);
    expect(static_cast<uint32_t>(group.failure()) == 1u << (ranks - 1), "another rank is named", rank, -2);
}

template <typename Run>
static void on_threads(int ranks, int64_t capacity, Run run) {
    size_t bytes = Group::bytes_needed(ranks, capacity);
    char* base = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return expect(false, "no memory", -1, -1);
    Group::format(base, ranks, capacity);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; rank++) threads.emplace_back(run, base, rank);
    for (std::thread& thread : threads) thread.join();
    munmap(base, bytes);
}

int main(int count, char** words) {
    if (count != 3) return 2;
    int ranks = std::atoi(words[1]);
    long rounds = std::atol(words[2]);
    on_threads(ranks, 1024, [=](char* base, int rank) { run_rank(base, rank, ranks, rounds); });
    on_threads(ranks, 1024, [=](char* base, int rank) { run_late(base, rank, ranks, 0.3); });
    if (wrong == 0) std::puts("ok");
    return wrong != 0;
}
