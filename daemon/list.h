/* Intrusive doubly linked list: a node lives inside the object it links. A head is a node that links to
 * itself when the list is empty. No thread of its own; whoever owns the head decides. */
#ifndef EPD_DAEMON_LIST_H
#define EPD_DAEMON_LIST_H

#include <stddef.h>

struct list {
    struct list *next, *prev;
};

static inline void list_init(struct list *node)
{
    node->next = node;
    node->prev = node;
}

static inline int list_empty(const struct list *head)
{
    return head->next == head;
}

/* Appends at the end. node must be initialised or removed. */
static inline void list_append(struct list *head, struct list *node)
{
    node->prev = head->prev;
    node->next = head;
    head->prev->next = node;
    head->prev = node;
}

/* Legal on a node that is in no list. */
static inline void list_remove(struct list *node)
{
    node->prev->next = node->next;
    node->next->prev = node->prev;
    list_init(node);
}

/* The object around a node. */
#define list_owner(node, type, member) ((type *)((char *)(node)-offsetof(type, member)))

/* Walks a list; the object of `node` may be removed and freed in the body, its successor may not. */
#define list_each(node, after, head)                                                                         \
    for (struct list *node = (head)->next, *after = node->next; node != (head);                              \
         node = after, after = node->next)

#endif
