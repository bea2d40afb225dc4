/* Numbers below 1.2e-38, with which arithmetic takes a hundred times as long. Gradients of states
   that decay come to be such: within a call they are zero. */

#ifdef __SSE__
#include <xmmintrin.h>
#endif

/* How a thread treats them. */
typedef uint64_t Mode;

static inline Mode mode_of_thread(void)
{
    Mode mode = 0;
#if defined(__SSE__)
    mode = _mm_getcsr();
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
#endif
    return mode;
}

static inline void set_mode(Mode mode)
{
#if defined(__SSE__)
    _mm_setcsr((unsigned)mode);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
}

/* The mode that was, to be set when the thread is done. */
static inline Mode flush_subnormal(void)
{
    Mode mode = mode_of_thread();
#if defined(__SSE__)
    set_mode(mode | 0x8040); /* results, and operands */
#elif defined(__aarch64__)
    set_mode(mode | 1 << 24);
#endif
    return mode;
}
