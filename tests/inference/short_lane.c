/* The CPU lane where the system starts two threads and no third. Prints whether a lane of four is opened and how many of its
   threads are ended, and whether one of two is. */

#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

static int started, ended;

static int few_threads(pthread_t *thread, const pthread_attr_t *how, void *(*act)(void *), void *with) {
    if (started == 2) return 11;
    started++;
    return pthread_create(thread, how, act, with);
}

static int ends(pthread_t thread, void **result) {
    ended++;
    return pthread_join(thread, result);
}

#define pthread_create few_threads
#define pthread_join ends
#include "cpu_lane.c"

int main(void) {
    alarm(20);
    lane_t *four = lane_open(4, 64, 32, 4096, 0, 100);
    printf("%s, %d ended, ", four ? "opened" : "refused", ended);
    started = 0;
    lane_t *two = lane_open(2, 64, 32, 4096, 0, 100);
    printf("%s\n", two ? "opened" : "refused");
    lane_close(two);
    return 0;
}
