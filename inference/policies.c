/* What policies do at every layer call, in one call each: as dozens of operations on small arrays it takes Python several
   times as long. The Python beside each says what it is, and runs where nothing can be compiled. */

#include <math.h>
#include <stdint.h>

/* Of ExpertMap._note: adds a layer's flags [E,M] of these experts to dots [M], all whole numbers; the first of the known
   maps that has most. */
int map_match(const float *flags, int memory, float *dots, int known, int count, const int64_t *expert) {
    for (int n = 0; n < count; n++)
        for (int m = 0; m < memory; m++) dots[m] += flags[expert[n] * memory + m];
    int best = 0;
    for (int m = 1; m < known; m++)
        if (dots[m] > dots[best]) best = m;
    return best;
}

/* ExpectedReuse._note_here, equal to it but for the order of additions and the last bits of logarithms.

   F features: R rates, the share of successions, and one that is constant. S = E + 1. */

typedef struct {
    int experts, rates;
    float step, floor, doubt, keep;
    const float *decay, *gain; /* [R] */
    float *weights, *squares;  /* [F] */
    float *used;               /* [S] of the newest call, the last is 1 */
} reuse_t;

/* x [F,E], rate [R+1,E], against [E] and followed [E,S] are the layer's; before: the experts of its last call. */
void reuse_note(const reuse_t *all, float *x, float *rate, float *against, float *followed, int before_count,
                const int64_t *before, int count, const int64_t *expert) {
    int E = all->experts, R = all->rates, F = R + 2, S = E + 1;
    float *used = all->used, error[E], share[S], *last = rate + (long)R * E;
    for (int e = 0; e < E; e++) used[e] = 0;
    for (int n = 0; n < count; n++) used[expert[n]] = 1;
    for (int e = 0; e < E; e++) {
        against[e] += 1;
        error[e] = 1 / against[e] - used[e];
    }
    for (int f = 0; f < F; f++) {
        float gradient = 0;
        for (int e = 0; e < E; e++) gradient += x[(long)f * E + e] * error[e];
        all->squares[f] += gradient * gradient;
        all->weights[f] -= all->step * gradient / sqrtf(all->squares[f]);
    }
    for (int f = 0; f < R; f++)
        for (int e = 0; e < E; e++) {
            float *one = rate + (long)f * E + e;
            *one = *one * all->decay[f] + all->gain[f] * (used[e] + all->floor);
        }
    for (int n = 0; n < before_count; n++) {
        float *behind = followed + before[n] * S;
        for (int s = 0; s < S; s++) behind[s] = behind[s] * all->keep + used[s];
    }
    for (int s = 0; s < S; s++) share[s] = 0;
    for (int n = 0; n < count; n++) {
        const float *behind = followed + expert[n] * S;
        float weight = 1 / (behind[E] + all->doubt) / count;
        for (int s = 0; s < S; s++) share[s] += weight * behind[s];
    }
    float prior = 1 - share[E];
    for (int e = 0; e < E; e++) last[e] = last[e - E] * prior + share[e] + all->floor * (1 - prior);
    for (long i = 0; i < (long)(R + 1) * E; i++) x[i] = logf(rate[i]);
    for (int e = 0; e < E; e++) {
        float odds = 0;
        for (int f = 0; f < F; f++) odds -= all->weights[f] * x[(long)f * E + e];
        against[e] = expf(odds < 15 ? odds : 15);
    }
}
