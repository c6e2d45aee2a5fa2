/* The limit: one thread of C with librabbitmq, a window of raw bodies in flight, all confirmed.
 *
 *   client HOST PORT USER PASSWORD VHOST EXCHANGE ROUTING_KEY BODY_BYTES [TASK]
 *
 * Says "{"ready": "c"}", then answers each line of standard input, "COUNT WINDOW", with a line of
 * figures as JSON. Messages are persistent and mandatory. They have no headers unless a task's name
 * is given: then they have the headers and properties that mlproducer/_wire/celery.py writes, which
 * the broker has to decode. Whenever the window is full it waits for a confirm, takes all that have
 * come, and fills up again.
 */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static amqp_connection_state_t connection;
static unsigned char *open_tags; /* a ring: whether a tag is in flight */
static uint64_t sent, oldest = 1, in_flight;

static amqp_basic_properties_t properties;
static amqp_table_entry_t headers[7];
static char id[] = "0a1b2c3d-1111-4222-8333-000000000000", tag[21];

enum { CHANNEL = 1, RING = 1 << 17, MAX_FRAME = 131072, LAST_GROUP = 24 };

static void die(const char *what) {
    fprintf(stderr, "client: %s\n", what);
    exit(1);
}

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void check(amqp_rpc_reply_t reply, const char *what) {
    if (reply.reply_type != AMQP_RESPONSE_NORMAL) die(what);
}

static void settle_one(uint64_t tag) {
    if (open_tags[tag % RING]) {
        open_tags[tag % RING] = 0;
        in_flight--;
    }
}

static void settle(uint64_t tag, int multiple) {
    if (multiple)
        while (oldest <= tag) settle_one(oldest++);
    else
        settle_one(tag);
}

static void take_frame(struct timeval *limit) {
    amqp_frame_t frame;
    if (amqp_simple_wait_frame_noblock(connection, &frame, limit) != AMQP_STATUS_OK)
        die("no confirm");
    if (frame.frame_type != AMQP_FRAME_METHOD) return; /* a heartbeat */
    if (frame.payload.method.id != AMQP_BASIC_ACK_METHOD) die("nacked, returned or closed");
    amqp_basic_ack_t *ack = frame.payload.method.decoded;
    settle(ack->delivery_tag, ack->multiple);
}

static void take_confirms(void) {
    struct timeval limit = {30, 0};
    take_frame(&limit);
    while (amqp_frames_enqueued(connection) || amqp_data_in_buffer(connection)) take_frame(&limit);
    amqp_maybe_release_buffers(connection);
}

static void describe(void) {
    properties._flags = AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_CONTENT_TYPE_FLAG;
    properties.delivery_mode = 2;
    properties.content_type = amqp_cstring_bytes("application/json");
}

static void text(const char *name, const char *value) {
    amqp_table_entry_t *entry = &headers[properties.headers.num_entries++];
    entry->key = amqp_cstring_bytes(name);
    entry->value.kind = AMQP_FIELD_KIND_UTF8;
    entry->value.value.bytes = amqp_cstring_bytes(value);
}

static void add_headers(const char *task, const char *origin) {
    properties.headers.entries = headers;
    text("lang", "py");
    text("task", task);
    text("argsrepr", "(...)");
    text("kwargsrepr", "{...}");
    text("origin", origin);
    text("id", id);
    text("root_id", id);
}

static void describe_task(const char *task) {
    static char origin[300];
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    snprintf(origin, sizeof origin, "gen%d@%s", getpid(), host);
    add_headers(task, origin);
    properties._flags |= AMQP_BASIC_CONTENT_ENCODING_FLAG | AMQP_BASIC_HEADERS_FLAG |
                         AMQP_BASIC_CORRELATION_ID_FLAG | AMQP_BASIC_MESSAGE_ID_FLAG |
                         AMQP_BASIC_CLUSTER_ID_FLAG;
    properties.content_encoding = amqp_cstring_bytes("utf-8");
    properties.correlation_id = properties.message_id = amqp_cstring_bytes(id);
    properties.cluster_id.bytes = tag;
}

/* Gives a message an id of its own and its delivery tag; headers and properties point at both. */
static void stamp(void) {
    snprintf(id + LAST_GROUP, sizeof id - LAST_GROUP, "%012" PRIu64, sent);
    properties.cluster_id.len = snprintf(tag, sizeof tag, "%" PRIu64, sent);
}

static void publish(long count, uint64_t window, char **names, amqp_bytes_t body) {
    amqp_bytes_t exchange = amqp_cstring_bytes(names[0]), key = amqp_cstring_bytes(names[1]);
    while (count > 0 || in_flight > 0) {
        while (count > 0 && in_flight < window) {
            count--;
            in_flight++;
            open_tags[++sent % RING] = 1;
            if (properties.headers.entries) stamp();
            if (amqp_basic_publish(connection, CHANNEL, exchange, key, 1, 0, &properties, body))
                die("cannot publish");
        }
        take_confirms();
    }
}

static void connect_to(char **argv) {
    connection = amqp_new_connection();
    amqp_socket_t *tcp = amqp_tcp_socket_new(connection);
    if (!tcp || amqp_socket_open(tcp, argv[1], atoi(argv[2]))) die("cannot connect");
    check(amqp_login(connection, argv[5], 0, MAX_FRAME, 0, AMQP_SASL_METHOD_PLAIN, argv[3],
                     argv[4]),
          "cannot log in");
    amqp_channel_open(connection, CHANNEL);
    check(amqp_get_rpc_reply(connection), "cannot open a channel");
    amqp_confirm_select(connection, CHANNEL);
    check(amqp_get_rpc_reply(connection), "no confirm mode");
}

int main(int argc, char **argv) {
    if (argc != 9 && argc != 10) die("wrong number of arguments");
    size_t size = strtoul(argv[8], NULL, 10);
    amqp_bytes_t body = amqp_bytes_malloc(size);
    open_tags = calloc(RING, 1);
    if (!body.bytes || !open_tags) die("no memory");
    memset(body.bytes, 'x', size);
    describe();
    if (argc == 10) describe_task(argv[9]);
    connect_to(argv);
    printf("{\"ready\": \"c\"}\n");
    fflush(stdout);
    long count;
    unsigned long window;
    while (scanf("%ld %lu", &count, &window) == 2 && window < RING) {
        double cpu = seconds(CLOCK_PROCESS_CPUTIME_ID), started = seconds(CLOCK_MONOTONIC);
        publish(count, window, argv + 6, body);
        printf("{\"count\": %ld, \"seconds\": %.9f, \"cpu\": %.9f}\n", count,
               seconds(CLOCK_MONOTONIC) - started, seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu);
        fflush(stdout);
    }
    amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
    amqp_destroy_connection(connection);
    return 0;
}
