"""One method on one data set: from a method's name to a run directory with its results.

The command line, the demo and the table all run methods through `execute`, so they agree on what a run is. A
run directory holds

    run.json       what was asked for (`RunSettings`)
    results.json   what came out: trained parameters, history, validation and test record, speed, memory
    best/          the adapter that was best on validation (`PromptedViT.save_pretrained`)
    log.jsonl ...  what `fastprompt.fit` writes
"""
