# Step 2, for one method setting: thresholds from the histograms, or from the model alone for a method without any.
rule thresholds:
    input:
        source=lambda wildcards: STUDY.threshold_source(
            wildcards.model, wildcards.run, wildcards.label
        ),
        tables=lambda wildcards: expand(
            rules.allocate.output[0],
            layer=STUDY.greedy_layers(wildcards.model, wildcards.run, wildcards.label),
            method=STUDY.setting(wildcards.run, wildcards.label).method_name,
            model=wildcards.model,
        ),
        file=lambda wildcards: STUDY.threshold_file(wildcards.run, wildcards.label),
    output:
        f"{RESULTS}/{{model}}/{{run}}/{{label}}/thresholds.parquet",
    log:
        f"{RESULTS}/logs/thresholds/{{model}}/{{run}}/{{label}}.log",
    benchmark:
        f"{RESULTS}/logs/thresholds/{{model}}/{{run}}/{{label}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: attempt * 1000,
        runtime=lambda wildcards, attempt: attempt * 10,
    params:
        method=lambda wildcards: method_options(
            STUDY.setting(wildcards.run, wildcards.label)
        ),
        tables=lambda wildcards, input: repeated("--table", input.tables),
        source=source_hash("calibration.derive"),
    message:
        "Thresholds of {wildcards.model} under {wildcards.label}"
    shell:
        "sparsetrace thresholds {input.source:q} {params.method} {params.tables} --out {output:q} > {log:q} 2>&1"
