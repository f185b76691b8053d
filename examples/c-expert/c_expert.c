// An expert in C that implements contract 2 (sdk/wit/2.0.0) without the SDK. A small MLP
// fuses the FM's embedding, every numeric feature and an embedding of the item. A value model
// ranks, with no two items of the same kind in a row.
//
// `wit-bindgen c` generates `expert.h` from the contract. The bindings free everything that an
// export returns, so each list is allocated with `malloc`, and a string of an argument may be moved
// into the result only once. README.md describes how to build this file.

#include <stdlib.h>
#include <string.h>

#include "expert.h"

enum { EMBEDDING = 8, HIDDEN = 32, ITEMS = 10000, MOST_NODES = 512, MOST_PARAMETERS = 64 };

typedef hypercast_expert_types_column_t column_t;
typedef hypercast_expert_types_attribute_t attribute_t;
typedef hypercast_expert_types_list_attribute_t attributes_t;
typedef hypercast_expert_types_node_t node_t;
typedef hypercast_expert_types_parameter_t parameter_t;
typedef hypercast_expert_types_schema_task_t task_t;

static void *zeros(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (memory == NULL && count > 0) __builtin_trap();
    return memory;
}

static expert_string_t text(const char *from) {
    expert_string_t string;
    expert_string_dup(&string, from);
    return string;
}

static bool is(expert_string_t a, expert_string_t b) {
    return a.len == b.len && memcmp(a.ptr, b.ptr, a.len) == 0;
}

static int find(expert_list_string_t names, const char *name) {
    for (size_t i = 0; i < names.len; i++)
        if (names.ptr[i].len == strlen(name) && memcmp(names.ptr[i].ptr, name, names.ptr[i].len) == 0) return (int)i;
    return -1;
}

// ---- describe: which tasks, and which columns ----

// The key of the diversity rule in `rank`: the first of these columns that the schema has.
static const char *kind_of(const expert_host_info_t *info) {
    static const char *const kinds[] = {"author_id", "tag", "genre"};
    for (size_t i = 0; i < 3; i++)
        if (find(info->ids, kinds[i]) >= 0) return kinds[i];
    return NULL;
}

void exports_expert_describe(expert_host_info_t *info, expert_description_t *ret) {
    *ret = (expert_description_t){.name = text("c-expert"), .version = text("1.0.0"), .fm_version = text("*")};
    ret->tasks.len = info->tasks.len;
    ret->tasks.ptr = zeros(info->tasks.len, sizeof *ret->tasks.ptr);
    for (size_t i = 0; i < info->tasks.len; i++) {
        ret->tasks.ptr[i].name = info->tasks.ptr[i].name;
        ret->tasks.ptr[i].kind = info->tasks.ptr[i].kind;
    }
    // In the order in which `network` reads them: features, the item, and the FM's embedding if
    // there is an FM.
    column_t *columns = zeros(info->features.len + 2, sizeof *columns);
    size_t count = 0;
    for (size_t i = 0; i < info->features.len; i++)
        columns[count++] = (column_t){HYPERCAST_EXPERT_TYPES_COLUMN_FEATURE, {.feature = info->features.ptr[i]}};
    columns[count++] = (column_t){HYPERCAST_EXPERT_TYPES_COLUMN_ID, {.id = text("item_id")}};
    if (info->tae_dim > 0) columns[count++].tag = HYPERCAST_EXPERT_TYPES_COLUMN_TAE;
    ret->columns.ptr = columns;
    ret->columns.len = count;
    const char *kind = kind_of(info);
    if (kind != NULL) {
        ret->rank_columns.ptr = zeros(1, sizeof(column_t));
        ret->rank_columns.ptr[0] = (column_t){HYPERCAST_EXPERT_TYPES_COLUMN_ID, {.id = text(kind)}};
        ret->rank_columns.len = 1;
    }
}

// ---- network: nodes, identified by their index ----

typedef struct {
    expert_network_t network;
    const char *layer;
} graph_t;

static attributes_t no_attributes(void) { return (attributes_t){0}; }

static attributes_t integer(const char *name, int64_t value) {
    attribute_t *attribute = zeros(1, sizeof *attribute);
    *attribute = (attribute_t){text(name), {HYPERCAST_EXPERT_TYPES_VALUE_INTEGER, {.integer = value}}};
    return (attributes_t){attribute, 1};
}

static attributes_t number(const char *name, float value) {
    attribute_t *attribute = zeros(1, sizeof *attribute);
    *attribute = (attribute_t){text(name), {HYPERCAST_EXPERT_TYPES_VALUE_NUMBER, {.number = value}}};
    return (attributes_t){attribute, 1};
}

static uint32_t add(graph_t *g, const char *op, size_t count, const uint32_t *inputs, attributes_t attributes) {
    if (g->network.nodes.len == MOST_NODES) __builtin_trap();
    node_t *node = &g->network.nodes.ptr[g->network.nodes.len];
    *node = (node_t){.op = text(op), .attributes = attributes, .layer = text(g->layer)};
    node->inputs.ptr = zeros(count, sizeof(uint32_t));
    node->inputs.len = count;
    memcpy(node->inputs.ptr, inputs, count * sizeof(uint32_t));
    return (uint32_t)g->network.nodes.len++;
}

static uint32_t one(graph_t *g, const char *op, uint32_t x) { return add(g, op, 1, &x, no_attributes()); }

static uint32_t two(graph_t *g, const char *op, uint32_t a, uint32_t b) {
    return add(g, op, 2, (uint32_t[]){a, b}, no_attributes());
}

static uint32_t input(graph_t *g, size_t column) {
    return add(g, "Input", 0, NULL, integer("column", (int64_t)column));
}

// Adds a parameter `LAYER.NAME`. It is a vector if `columns` is 0.
static uint32_t parameter(graph_t *g, const char *name, uint32_t rows, uint32_t columns, uint8_t initialiser) {
    if (g->network.parameters.len == MOST_PARAMETERS) __builtin_trap();
    char *full = zeros(strlen(g->layer) + strlen(name) + 2, 1);
    strcat(strcat(strcpy(full, g->layer), "."), name);
    parameter_t *p = &g->network.parameters.ptr[g->network.parameters.len];
    *p = (parameter_t){.name = text(full), .init = {.tag = initialiser}};
    free(full);
    p->shape.len = columns == 0 ? 1 : 2;
    p->shape.ptr = zeros(2, sizeof(uint32_t));
    p->shape.ptr[0] = rows;
    p->shape.ptr[1] = columns;
    return add(g, "Parameter", 0, NULL, integer("parameter", (int64_t)g->network.parameters.len++));
}

static uint32_t linear(graph_t *g, const char *layer, uint32_t x, uint32_t from, uint32_t to) {
    g->layer = layer;
    uint32_t weight = parameter(g, "weight", from, to, HYPERCAST_EXPERT_TYPES_INITIALISER_XAVIER_UNIFORM);
    uint32_t bias = parameter(g, "bias", to, 0, HYPERCAST_EXPERT_TYPES_INITIALISER_ZEROS);
    return two(g, "Add", two(g, "MatMul", x, weight), bias);
}

static uint32_t normalised(graph_t *g, const char *layer, uint32_t x, uint32_t width) {
    g->layer = layer;
    uint32_t scale = parameter(g, "scale", width, 0, HYPERCAST_EXPERT_TYPES_INITIALISER_ONES);
    uint32_t bias = parameter(g, "bias", width, 0, HYPERCAST_EXPERT_TYPES_INITIALISER_ZEROS);
    return add(g, "LayerNormalization", 3, (uint32_t[]){x, scale, bias}, number("epsilon", 1e-5f));
}

bool exports_expert_network(expert_host_info_t *info, expert_network_t *ret, expert_string_t *err) {
    size_t features = info->features.len;
    // `Concat` takes at most 256 inputs; two of them are the item and the FM.
    if (features > 254 || 2 * info->tasks.len + 8 > MOST_PARAMETERS) {
        *err = text("c-expert: the schema has too many features or tasks for this expert");
        return false;
    }
    graph_t g = {.layer = "inputs"};
    g.network.nodes.ptr = zeros(MOST_NODES, sizeof(node_t));
    g.network.parameters.ptr = zeros(MOST_PARAMETERS, sizeof(parameter_t));
    uint32_t parts[256], width = (uint32_t)features + EMBEDDING;
    size_t count = 0;
    for (; count < features; count++) parts[count] = input(&g, count);
    g.layer = "item";
    uint32_t table = parameter(&g, "table", ITEMS, EMBEDDING, HYPERCAST_EXPERT_TYPES_INITIALISER_XAVIER_UNIFORM);
    parts[count++] = two(&g, "EmbeddingBag", table, input(&g, features));
    if (info->tae_dim > 0) {
        g.layer = "fm";
        parts[count++] = normalised(&g, "fm", input(&g, features + 1), info->tae_dim);
        width += info->tae_dim;
    }
    uint32_t all = add(&g, "Concat", count, parts, integer("axis", 1));
    uint32_t hidden = one(&g, "Silu", linear(&g, "hidden", all, width, HIDDEN));
    g.network.outputs.len = info->tasks.len;
    g.network.outputs.ptr = zeros(info->tasks.len, sizeof *g.network.outputs.ptr);
    for (size_t i = 0; i < info->tasks.len; i++) {
        task_t *task = &info->tasks.ptr[i];
        char *layer = zeros(task->name.len + 6, 1);
        memcpy(memcpy(layer, "head_", 5) + 5, task->name.ptr, task->name.len);
        // A direct linear path from the inputs. With few logs, most of what can be learned is
        // linear.
        uint32_t deep = linear(&g, layer, hidden, HIDDEN, 1);
        uint32_t direct = parameter(&g, "direct", width, 1, HYPERCAST_EXPERT_TYPES_INITIALISER_ZEROS);
        uint32_t logit = two(&g, "Add", deep, two(&g, "MatMul", all, direct));
        g.network.outputs.ptr[i] = (hypercast_expert_types_output_t){task->name, logit};
        g.layer = "";
        free(layer);
    }
    *ret = g.network;
    return true;
}

// ---- rank: a value model and a diversity rule ----

static float worth(expert_string_t task) {
    static const struct { const char *task; float worth; } worths[] = {
        {"is_like", 2}, {"like", 2}, {"finish", 2}, {"love", 3}, {"dislike", -2}, {"watch", 0.5f}, {"watch_ratio", 0.5f},
    };
    for (size_t i = 0; i < sizeof worths / sizeof *worths; i++)
        if (strlen(worths[i].task) == task.len && memcmp(worths[i].task, task.ptr, task.len) == 0) return worths[i].worth;
    return 1;
}

static int best_first(const void *a, const void *b) {
    const expert_ranked_t *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->candidate < y->candidate ? -1 : x->candidate > y->candidate;
}

// Moves an item of another kind up if an item has the same kind as the one before it. If there is
// no item of another kind left, the order stays.
static void spread(expert_ranked_t *ranked, size_t count, size_t limit, const uint64_t *kinds) {
    for (size_t place = 1; place < limit; place++) {
        size_t next = place;
        while (next < count && kinds[ranked[next].candidate] == kinds[ranked[place - 1].candidate]) next++;
        if (next == count || next == place) continue;
        expert_ranked_t chosen = ranked[next];
        memmove(&ranked[place + 1], &ranked[place], (next - place) * sizeof *ranked);
        ranked[place] = chosen;
    }
}

bool exports_expert_rank(expert_rank_request_t *request, expert_list_prediction_t *predictions,
                         expert_list_named_column_t *columns, expert_list_ranked_t *ret, expert_string_t *err) {
    (void)err;
    size_t count = request->candidates.len, limit = request->limit < count ? request->limit : count;
    expert_ranked_t *ranked = zeros(count, sizeof *ranked);
    for (size_t i = 0; i < count; i++) ranked[i].candidate = (uint32_t)i;
    for (size_t task = 0; task < predictions->len; task++) {
        expert_prediction_t *prediction = &predictions->ptr[task];
        float weight = worth(prediction->task);
        for (size_t i = 0; i < count; i++) ranked[i].score += weight * prediction->values.ptr[i];
    }
    qsort(ranked, count, sizeof *ranked, best_first);
    if (columns->len > 0 && columns->ptr[0].data.tag == HYPERCAST_EXPERT_TYPES_DATA_IDS)
        spread(ranked, count, limit, columns->ptr[0].data.val.ids.ptr);
    *ret = (expert_list_ranked_t){ranked, limit};
    if (limit == 0) free(ranked);
    return true;
}

// ---- training: labels as the host's schema defines them ----

static bool counts_on(const task_t *task, const expert_host_info_t *info, uint32_t surface) {
    if (task->surfaces.len == 0) return true;
    for (size_t i = 0; i < task->surfaces.len && surface < info->surfaces.len; i++)
        if (is(task->surfaces.ptr[i], info->surfaces.ptr[surface])) return true;
    return false;
}

static int place_of(const expert_list_string_t *names, expert_string_t name) {
    for (size_t i = 0; i < names->len; i++)
        if (is(names->ptr[i], name)) return (int)i;
    return -1;
}

bool exports_expert_labels(expert_host_info_t *info, expert_action_batch_t *batch, expert_list_task_labels_t *ret,
                           expert_string_t *err) {
    size_t rows = batch->surface.len;
    ret->len = info->tasks.len;
    ret->ptr = zeros(ret->len, sizeof *ret->ptr);
    for (size_t t = 0; t < info->tasks.len; t++) {
        task_t *task = &info->tasks.ptr[t];
        bool binary = task->kind == HYPERCAST_EXPERT_TYPES_TASK_KIND_BINARY;
        int label = place_of(binary ? &info->actions : &info->values, task->label);
        if (label < 0) {
            *err = text("c-expert: a task's label is neither an action nor a value of the schema");
            return false;
        }
        expert_task_labels_t *of = &ret->ptr[t];
        *of = (expert_task_labels_t){.task = task->name,
                                     .labels = {zeros(rows, sizeof(float)), rows},
                                     .mask = {zeros(rows, 1), rows}};
        for (size_t row = 0; row < rows; row++) {
            if (!counts_on(task, info, batch->surface.ptr[row])) continue;
            if (binary) {
                of->labels.ptr[row] = (float)(batch->actions.ptr[row] >> label & 1);
                of->mask.ptr[row] = batch->known.ptr[row] >> label & 1;
            } else {
                float value = batch->values.ptr[label].values.ptr[row];
                of->mask.ptr[row] = value == value;
                of->labels.ptr[row] = value == value ? value : 0;
            }
        }
    }
    return true;
}

void exports_expert_sample(expert_host_info_t *info, expert_action_batch_t *batch, expert_list_f32_t *ret) {
    (void)info, (void)batch;
    // Keep every example.
    *ret = (expert_list_f32_t){0};
}

// Keeps the host's learning rate with its warm-up and decay.
float exports_expert_schedule(expert_training_step_t *step) {
    (void)step;
    return 1;
}

// ---- evaluate: hold parameters that are clearly worse than the serving ones ----

enum { ENOUGH_EXAMPLES = 1000 };

void exports_expert_evaluate(expert_host_info_t *info, expert_evaluation_t *evaluation, expert_verdict_t *ret) {
    (void)info;
    *ret = (expert_verdict_t){.tag = HYPERCAST_EXPERT_TYPES_VERDICT_PUBLISH};
    for (size_t i = 0; i < evaluation->slices.len; i++) {
        hypercast_expert_types_slice_t *slice = &evaluation->slices.ptr[i];
        bool compared = slice->candidate.ne.is_some && slice->serving.is_some && slice->serving.val.ne.is_some;
        if (!compared || slice->surface.is_some || slice->examples < ENOUGH_EXAMPLES) continue;
        if (slice->candidate.ne.val > 1.02 * slice->serving.val.ne.val) {
            ret->tag = HYPERCAST_EXPERT_TYPES_VERDICT_HOLD;
            ret->val.hold = text("c-expert: a task's NE is more than 2 % above the serving version's");
            return;
        }
    }
}
