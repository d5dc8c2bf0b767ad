# For `allocation: greedy`: one layer's search table, from which any target is looked up.
rule allocate:
    input:
        model=lambda wildcards: STUDY.runtime_model(wildcards.model),
        histograms=rules.histograms.output[0],
        text=lambda wildcards: STUDY.calibration_text(wildcards.model),
    output:
        f"{RESULTS}/{{model}}/greedy/{{method}}/{{layer}}.parquet",
    log:
        f"{RESULTS}/logs/allocate/{{model}}/{{method}}/{{layer}}.log",
    benchmark:
        f"{RESULTS}/logs/allocate/{{model}}/{{method}}/{{layer}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=STUDY.gpus,
        mem_mb=lambda wildcards, input, attempt: STUDY.needs(
            "allocate", wildcards.model, input.model, attempt
        ).mem_mb,
        runtime=lambda wildcards, input, attempt: STUDY.needs(
            "allocate", wildcards.model, input.model, attempt
        ).runtime,
    params:
        layer=lambda wildcards: int(wildcards.layer),
        options=lambda wildcards: options(STUDY.models[wildcards.model].greedy),
        machine=options(STUDY.machine),
        source=source_hash("calibration.greedy"),
    message:
        "Searching layer {wildcards.layer} of {wildcards.model} under {wildcards.method}"
    shell:
        "sparsetrace allocate {input.model:q} --histograms {input.histograms:q} --text {input.text:q}"
        " --layer {params.layer} --method {wildcards.method} --out {output:q} {params.options} {params.machine}"
        " > {log:q} 2>&1"
