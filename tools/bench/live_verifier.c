/* First and only process of a guest that is migrated in tests: fills memory, goes on rewriting pages of it in a random order, and checks every page, whole, again and again.
 *
 *     init MEBIBYTES REWRITES-A-SECOND CHECKS-A-SECOND [DISK-MEBIBYTES DISK-WRITES-A-SECOND DISK-CHECKS-A-SECOND]
 *
 * A page's 512 words follow from its number and its generation, and the generations are kept apart from the pages: one page that is lost, old or damaged, of either, is found. To the console go a dot every
 * tick, `S sweep rewritten` after each check of all pages, and `BAD ...` for each that is not what it should be. With a disk the same is done with its blocks, each read and written past the guest's own
 * cache and synced, their generations in memory; `D sweep written` comes after each check of all blocks. No library: any C compiler for x86-64 will do.
 */

typedef unsigned long u64;
#define WORDS 512
#define TICK_NS 5000000L /* short, so that a standstill can be told to that */

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return result;
}

static void say(const char *text)
{
    long length = 0;
    while (text[length]) length++;
    call(1, 1, (long)text, length, 0, 0, 0);
}

static char *number(char *at, u64 value)
{
    char digits[24];
    int count = 0;
    do digits[count++] = '0' + value % 10; while (value /= 10);
    *at++ = ' ';
    while (count) *at++ = digits[--count];
    return at;
}

static void tell(const char *what, u64 a, u64 b, u64 c, u64 d, int values)
{
    char line[160], *at = line;
    u64 given[4] = {a, b, c, d};
    *at++ = '\n';
    while (*what) *at++ = *what++;
    for (int n = 0; n < values; n++) at = number(at, given[n]);
    *at++ = '\n';
    *at = 0;
    say(line);
}

static u64 read_number(const char *text)
{
    u64 value = 0;
    while (*text >= '0' && *text <= '9') value = value * 10 + (u64)(*text++ - '0');
    return value;
}

static long now(void)
{
    long time[2];
    call(228, 1, (long)time, 0, 0, 0, 0);
    return time[0] * 1000000000L + time[1];
}

static u64 seed(u64 page, u64 generation)
{
    u64 x = page * 0x9E3779B97F4A7C15UL + generation * 0xBF58476D1CE4E5B9UL + 1;
    x ^= x >> 29;
    return x * 0x94D049BB133111EBUL;
}

static volatile u64 *pages;
static volatile u64 *generations;

static void fill(u64 page)
{
    u64 value = seed(page, generations[page]);
    for (int n = 0; n < WORDS; n++, value += 0x9E3779B97F4A7C15UL) pages[page * WORDS + n] = value;
}

static void check(u64 page)
{
    u64 value = seed(page, generations[page]);
    for (int n = 0; n < WORDS; n++, value += 0x9E3779B97F4A7C15UL)
        if (pages[page * WORDS + n] != value) {
            tell("BAD page, word, generation, found", page, n, generations[page], pages[page * WORDS + n], 4);
            return;
        }
}

static u64 room(u64 bytes)
{
    return (u64)call(9, 0, bytes, 3, 0x22, -1, 0);
}

static volatile u64 *blocks;
static u64 *block;
static long disk;
#define DISK_SEED (1UL << 40) /* added to a block's number, so that no block looks like a page */
#define FILL 64

static void compose(u64 *into, u64 at, u64 generation)
{
    u64 value = seed(at + DISK_SEED, generation);
    for (int n = 0; n < WORDS; n++, value += 0x9E3779B97F4A7C15UL) into[n] = value;
}

static void check_block(u64 at)
{
    long got = call(17, disk, (long)block, WORDS * 8, (long)(at * WORDS * 8), 0, 0);
    if (got != WORDS * 8) { tell("BAD disk read, block, error", at, (u64)-got, 0, 0, 2); return; }
    u64 value = seed(at + DISK_SEED, blocks[at]);
    for (int n = 0; n < WORDS; n++, value += 0x9E3779B97F4A7C15UL)
        if (block[n] != value) {
            tell("BAD block, word, generation, found", at, n, blocks[at], block[n], 4);
            return;
        }
}

static void write_blocks(u64 at, u64 count)
{
    for (u64 n = 0; n < count; n++) compose(block + n * WORDS, at + n, blocks[at + n]);
    long put = call(18, disk, (long)block, (long)(count * WORDS * 8), (long)(at * WORDS * 8), 0, 0);
    if (put != (long)(count * WORDS * 8)) tell("BAD disk write, block, error", at, (u64)-put, 0, 0, 2);
}

static void open_disk(void)
{
    char name[] = "/modules/0";
    for (; name[9] <= '9'; name[9]++) {
        long module = call(2, (long)name, 0, 0, 0, 0, 0);
        if (module < 0) break;
        call(313, module, (long)"", 0, 0, 0, 0);
        call(3, module, 0, 0, 0, 0, 0);
    }
    call(83, (long)"/dev", 0755, 0, 0, 0, 0);
    call(165, (long)"dev", (long)"/dev", (long)"devtmpfs", 0, 0, 0);
    for (int n = 0; n < 1000; n++) { /* the kernel makes it when it has found it */
        disk = call(2, (long)"/dev/vda", 2 | 0x4000 | 0x1000, 0, 0, 0, 0);
        if (disk >= 0) return;
        long wait[2] = {0, 10000000};
        call(35, (long)wait, 0, 0, 0, 0, 0);
    }
    say("\nFAILED: no disk\n");
}

__attribute__((used)) static void run(long *stack)
{
    char **arguments = (char **)(stack + 1);
    u64 count, rewrites, checks, random = 88172645463325252UL, sweep = 0, at = 0, rewritten = 0, rewriting = 0, checking = 0;
    u64 held = 0, writes = 0, reads = 0, disk_sweep = 0, disk_at = 0, written = 0, writing = 0, reading = 0;
    if (stack[0] < 4) { say("\nFAILED: MEBIBYTES REWRITES CHECKS\n"); for (;;) call(34, 0, 0, 0, 0, 0, 0); }
    count = read_number(arguments[1]) << 8;
    rewrites = read_number(arguments[2]);
    checks = read_number(arguments[3]);
    pages = (u64 *)room(count << 12);
    generations = (u64 *)room(count * sizeof(u64));
    if ((long)pages < 0 || (long)generations < 0) { say("\nFAILED: no memory\n"); for (;;) call(34, 0, 0, 0, 0, 0, 0); }
    for (u64 page = 0; page < count; page++) { generations[page] = 1; fill(page); }
    if (stack[0] >= 7) {
        held = read_number(arguments[4]) << 8;
        writes = read_number(arguments[5]);
        reads = read_number(arguments[6]);
        blocks = (u64 *)room(held * sizeof(u64));
        block = (u64 *)room(FILL * WORDS * 8);
        if ((long)blocks < 0 || (long)block < 0) { say("\nFAILED: no memory\n"); held = 0; }
        if (held) open_disk();
        for (u64 n = 0; n < held; n++) blocks[n] = 1;
        for (u64 n = 0; n < held; n += FILL) write_blocks(n, FILL);
    }
    tell("READY", count, rewrites, checks, 0, 3);
    long due = now(), last = due;
    for (;;) {
        long time = now();
        u64 passed = (u64)(time - last);
        if (passed > 50000000UL) passed = 50000000UL; /* after a standstill it does not catch up */
        last = time;
        for (rewriting += rewrites * passed; rewriting >= 1000000000UL; rewriting -= 1000000000UL) {
            random ^= random << 13; random ^= random >> 7; random ^= random << 17;
            u64 page = random % count;
            check(page);
            generations[page]++;
            fill(page);
            rewritten++;
        }
        for (checking += checks * passed; checking >= 1000000000UL; checking -= 1000000000UL) {
            check(at);
            if (++at == count) { at = 0; tell("S", ++sweep, rewritten, 0, 0, 2); }
        }
        if (held) {
            for (writing += writes * passed; writing >= 1000000000UL; writing -= 1000000000UL) {
                random ^= random << 13; random ^= random >> 7; random ^= random << 17;
                u64 one = random % held;
                check_block(one);
                blocks[one]++;
                write_blocks(one, 1);
                written++;
            }
            for (reading += reads * passed; reading >= 1000000000UL; reading -= 1000000000UL) {
                check_block(disk_at);
                if (++disk_at == held) { disk_at = 0; tell("D", ++disk_sweep, written, 0, 0, 2); }
            }
        }
        say(".");
        due += TICK_NS;
        time = now();
        if (due < time) due = time;
        long wait[2] = {0, due - time};
        if (wait[1] > 0) call(35, (long)wait, 0, 0, 0, 0, 0);
    }
}

__asm__(".globl _start\n_start:\n xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call run\n hlt\n");
