#include "launcher/commands.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

static const char usage[] = "usage: tessera show --input FILE --results FILE\n\n"
                            "Prints the prompts of a batch file and, below each, what was generated for it.\n\n"
                            "  --input FILE         the requests\n"
                            "  --results FILE       the records that tessera run wrote for them\n"
                            "\nexample:\n"
                            "  tessera show --input configs/demo/requests.jsonl --results results/demo.jsonl\n";

enum { OPTION_INPUT = TS_OPTION_OWN, OPTION_RESULTS };

typedef struct show_options {
    const char *input, *results;
} show_options;

static ts_status parse_own(void *context, int option, const char *value) {
    show_options *options = context;
    if (option == OPTION_INPUT)
        options->input = value;
    else
        options->results = value;
    return TS_OK;
}

// Every line of a file of JSON objects that has a custom_id, by that id.
static ts_status read_lines(const char *path, json_t *by_id) {
    ts_status status = TS_OK;
    char *line = NULL;
    size_t capacity = 0;
    FILE *file = fopen(path, "rb");
    TS_CHECK(file, TS_ERR_IO, "%s: cannot open it: %s", path, strerror(errno));
    for (ssize_t n; (n = getline(&line, &capacity, file)) >= 0;) {
        json_t *object = json_loadb(line, (size_t)n, 0, NULL);
        const char *id = json_string_value(json_object_get(object, "custom_id"));
        if (id)
            json_object_set(by_id, id, object);
        json_decref(object);
    }
done:
    free(line);
    if (file)
        fclose(file);
    return status;
}

static void show(const char *id, const json_t *request, const json_t *record) {
    const json_t *response = json_object_get(record, "response"), *body = json_object_get(response, "body");
    const char *prompt = json_string_value(json_object_get(json_object_get(request, "body"), "prompt"));
    const char *refusal = json_string_value(json_object_get(json_object_get(body, "error"), "message"));
    size_t i;
    const json_t *choice;
    printf("--- %s\n%s", id, prompt ? prompt : "(token ids)");
    if (!record)
        printf("\n    (no record)");
    if (refusal)
        printf("\n    refused: %s", refusal);
    json_array_foreach(json_object_get(body, "choices"), i, choice) {
        if (json_array_size(json_object_get(body, "choices")) > 1)
            printf("\n>>> [%zu]", i);
        else
            printf(" >>>");
        printf("%s", json_string_value(json_object_get(choice, "text")));
        printf("  [%s]", json_string_value(json_object_get(choice, "finish_reason")));
    }
    printf("\n\n");
}

ts_status ts_command_show(ts_launch *launch, int argc, char **argv) {
    static const struct option table[] = {
        {"input", required_argument, NULL, OPTION_INPUT},
        {"results", required_argument, NULL, OPTION_RESULTS},
        {"help", no_argument, NULL, TS_OPTION_HELP},
        {0},
    };
    ts_status status = TS_OK;
    ts_launch_options shared;
    show_options options = {0};
    json_t *requests = json_object(), *records = json_object(), *request;
    const char *id;
    TS_TRY(ts_launch_parse(launch, argc, argv, table, usage, &shared, parse_own, &options));
    if (shared.help || ts_group_rank(launch->world) != 0)
        goto done;
    launch->agreed = true; // nobody waits for rank 0
    TS_CHECK(options.input && options.results, TS_ERR_INVALID, "show: --input FILE and --results FILE are needed");
    TS_TRY(read_lines(options.input, requests));
    TS_TRY(read_lines(options.results, records));
    json_object_foreach(requests, id, request) show(id, request, json_object_get(records, id));
done:
    json_decref(requests);
    json_decref(records);
    return status;
}
