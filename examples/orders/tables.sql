-- The tables of this example, beside the outbox that `outbox-relay migrate` makes.

-- The shop's.
create table stock (
    product   text primary key,
    available int not null check (available >= 0)
);
create table orders (
    id        bigint generated always as identity primary key,
    customer  text not null,
    product   text not null,
    quantity  int not null check (quantity > 0),
    placed_at timestamptz not null default now()
);

-- What the consumers did: the id of each event stands in one transaction with its
-- effect. The inbox must be in the database of the effects, not in that of the shop.
create table inbox (
    consumer   text not null,
    event_id   text not null,
    handled_at timestamptz not null default now(),
    primary key (consumer, event_id)
);

-- The warehouse's.
create table shelf (
    product text primary key,
    count   int not null
);
create table parcels (
    order_id bigint not null,
    product  text not null,
    quantity int not null
);

-- The mails that wait to be sent.
create table mails (
    order_id  bigint not null,
    recipient text not null,
    body      text not null
);
