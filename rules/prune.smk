# Where the study file says `prune`: the converted model with masked weights, which all later steps then use.
rule prune:
    input:
        model=rules.convert.output[0],
        text=lambda wildcards: STUDY.pruning_text(wildcards.model),
    output:
        config=f"{RESULTS}/{{model}}/pruned/config.json",
        masks=f"{RESULTS}/{{model}}/pruned/weight_masks.parquet",
    log:
        f"{RESULTS}/logs/prune/{{model}}.log",
    benchmark:
        f"{RESULTS}/logs/prune/{{model}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=STUDY.gpus,
        mem_mb=lambda wildcards, input, attempt: STUDY.needs(
            "prune", wildcards.model, input.model, attempt
        ).mem_mb,
        runtime=lambda wildcards, input, attempt: STUDY.needs(
            "prune", wildcards.model, input.model, attempt
        ).runtime,
    params:
        out=subpath(output.config, parent=True),
        text=lambda wildcards, input: repeated("--text", input.text),
        method=lambda wildcards: weight_method_options(
            STUDY.models[wildcards.model].prune
        ),
        options=lambda wildcards: options(STUDY.models[wildcards.model].calibration),
        machine=options(STUDY.machine),
        source=source_hash("calibration.weight_masks"),
    message:
        "Masking the weights of {wildcards.model}"
    shell:
        "sparsetrace prune {input.model:q} {params.method} {params.text} --out {params.out:q}"
        " {params.options} {params.machine} > {log:q} 2>&1"
