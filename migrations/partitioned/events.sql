-- The outbox partitioned by range of created_at: Render puts this in the place of
-- the plain table's definition in 001. A row's partition is chosen before its
-- trigger runs, so created_at has a default instead. The trigger fills in the
-- rest; the id too, since the primary key of a partitioned table alone would not
-- keep two partitions from having the same.
create or replace function on_events_create() returns trigger as $$
begin
    new.id = 'event_' || gen_random_ulid(); -- gen_random_uuid() or gen_random_ulid()
    new.version = 0;
    new.status = 'pending';
    new.published_at = null;
    new.failed_at = null;
    new.failed_reasons = null;
    new.failed_attempts = 0;
    new.retried_at = null;
    new.retried_attempts = 0;
    return new; -- created_at stays: it has chosen the partition
end;
$$ language plpgsql;

create table if not exists events
(
    id               text          not null,
    version          int default 0 not null,
    aggregate_type   text          not null,
    event_type       text          not null,
    payload          jsonb         not null,
    status           text          not null,
    published_at     timestamptz   null,
    failed_at        timestamptz   null,
    failed_reasons   text[]        null,
    failed_attempts  int default 0 not null,
    retried_at       timestamptz   null,
    retried_attempts int default 0 not null,
    created_at       timestamptz   not null default now(),
    constraint events_id_primary_key primary key (id, created_at),
    constraint events_id_check check ( trim(id) <> '' ),
    constraint events_version_check check ( version >= 0 ),
    constraint events_aggregate_type_check check ( trim(aggregate_type) <> '' ),
    constraint events_event_type_check check ( trim(event_type) <> '' ),
    constraint events_status_check check ( status in ('pending', 'published', 'failed') )
) partition by range (created_at);

create or replace trigger on_events_create before insert on events
    for each row execute function on_events_create();
-- +goose StatementEnd

-- The default partition takes what no other does, so that no insert ever fails for
-- want of one. outbox_relay_add_partitions makes the others: call it before the
-- first insert, and then ahead of time, for where this one has rows, no other can
-- be made.
-- +goose StatementBegin
do $do$
declare
    default_partition oid := (select partdefid from pg_partitioned_table where partrelid = 'events'::regclass);
begin
    if default_partition is null then
        raise exception 'table % is there already and is not partitioned', 'events'::regclass
            using errcode = 'wrong_object_type',
                  hint = 'Name another (OUTBOX_TABLE), or leave out --partitioned.';
    end if;
    if default_partition = 0 then
        create table events_default partition of events default with (fillfactor = 50);
    end if;
end;
$do$;
-- +goose StatementEnd
